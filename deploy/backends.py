"""The exported model in each runtime that can run it. In fp32 all of them give the same answer."""

import argparse
import contextlib
import io
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy.common import runtime
from deploy.common.cli import NO_PADDLE, UserError, boolean, positive_int, warn

FILES = {
    "paddle": ("inference.json", "inference.pdiparams"),
    "onnxruntime": ("inference.onnx",),
    "openvino": ("inference.onnx",),
}
OLD_PROGRAM = "inference.pdmodel"  # what Paddle 2.6 writes in place of inference.json; later ones read it as well
# ONNX Runtime's own choices are TF32, which rounds to 11 bits (scores differed by 7e-4 on an H200, without by 4e-7),
# and to try all of cuDNN's algorithms at each new batch size (half a second to three; then no faster).
CUDA_OPTIONS = {"use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
ANY_NUMBER = -1  # number of pictures, to OpenVINO
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


class Backend(Protocol):
    """An exported model, loaded."""

    device: str  # cpu or gpu
    version: str  # name and version of the runtime

    def run(self, images: Any) -> list[Any]:
        """(B, 3, H, W) float32 -> anomaly map (B, 1, H, W), smoothed map (B, 1, H, W), image score (B).

        Raises:
            UserError: the model is one for another size, or the run failed, for want of memory perhaps.
        """
        ...


@dataclass(frozen=True)
class Options:
    """What a user may ask of a runtime; `threads` are those of the CPU.

    OpenVINO is 1 to 12% faster with a graph of its own, half a second's work, for each of the `usual_batches`. With
    `winograd` that graph has half the multiplications in its 3x3 convolutions, and is the work of five to ten seconds.
    """

    use_gpu: bool = False
    threads: int = 1
    precision: str = "fp32"
    use_mkldnn: bool = True
    use_tensorrt: bool = False
    max_batch_size: int = 16
    usual_batches: Collection[int] = (1,)
    winograd: bool = False


def model_files(folder: Path, backend: str) -> tuple[str, ...]:
    """Names of the files in this folder that the runtime reads, or would read if they were there."""
    if backend == "paddle" and (folder / OLD_PROGRAM).is_file():
        return (OLD_PROGRAM, *FILES["paddle"][1:])
    return FILES[backend]


def load_exported(folder: Path, backend: str = "paddle", options: Options | None = None) -> Backend:
    """The exported model of this folder in one of the runtimes of `FILES`.

    Raises:
        UserError: the runtime is not installed, cannot do what the options ask for, or cannot load the model.
    """
    options = options or Options()
    if options.precision == "int8":
        raise UserError(
            "--precision int8: not offered, it would cost accuracy (docs/en/deploy.md); use fp32, fp16 or bf16"
        )
    if options.use_tensorrt and backend != "paddle":
        raise UserError(f"--use_tensorrt True: goes with --backend paddle, not {backend}")
    if options.winograd and (backend, options.precision) != ("openvino", "fp32"):
        raise UserError("--winograd True: goes with --backend openvino and --precision fp32 only")
    classes: dict[str, Callable[[Path, Options], Backend]] = {
        "paddle": PaddleModel,
        "onnxruntime": OnnxRuntimeModel,
        "openvino": OpenvinoModel,
    }
    with _importing(backend):
        return classes[backend](folder, options)


class PaddleModel:
    """Paddle Inference."""

    def __init__(self, folder: Path, options: Options) -> None:
        import paddle
        from paddle import inference

        self.version = f"paddle {paddle.__version__}"
        program, parameters = model_files(folder, "paddle")
        if options.use_tensorrt and program != OLD_PROGRAM:
            # Paddle 3 runs a program of its own form in TensorRT only once paddle.tensorrt has converted it on a GPU.
            raise UserError(f"--use_tensorrt True: Paddle has it for {OLD_PROGRAM} only, not {program}; leave it out")
        config = inference.Config(str(folder / program), str(folder / parameters))
        if program != OLD_PROGRAM:
            if not hasattr(config, "enable_new_ir"):
                raise UserError(f"{folder / program}: {self.version} cannot read it; export with this Paddle")
            config.enable_new_ir(True)  # without both of these enable_memory_optim fails on a PIR program
            config.enable_new_executor(True)
        config.enable_memory_optim()
        config.disable_glog_info()
        gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
        self.device = "gpu" if options.use_gpu and gpus else "cpu"
        if options.use_tensorrt and self.device == "cpu":
            raise UserError("--use_tensorrt True: needs --use_gpu True and a GPU that Paddle sees")
        if options.use_gpu and not gpus:
            warn("--use_gpu True: Paddle sees no GPU here; running on the CPU")
        if self.device == "gpu":
            self._configure_gpu(inference, config, options)
        else:
            self._configure_cpu(config, options, program)
        try:
            self._predictor = inference.create_predictor(config)
        except Exception as error:  # Paddle raises its own kinds
            raise UserError(f"{folder}: {self.version} cannot load this model ({error})") from error
        self._input = self._predictor.get_input_handle(self._predictor.get_input_names()[0])

    def _configure_gpu(self, inference: Any, config: Any, options: Options) -> None:
        kinds = inference.PrecisionType
        kind = {"fp32": kinds.Float32, "fp16": kinds.Half, "bf16": kinds.Bfloat16}[options.precision]
        config.enable_use_gpu(256, 0, kind)  # MiB of memory taken at first, card
        if options.use_tensorrt:
            if inference.get_trt_compile_version() == (0, 0, 0):
                raise UserError(f"--use_tensorrt True: {self.version} was built without TensorRT")
            config.enable_tensorrt_engine(max_batch_size=options.max_batch_size, precision_mode=kind)

    def _configure_cpu(self, config: Any, options: Options, program: str) -> None:
        if options.precision == "bf16" and program == OLD_PROGRAM:  # Paddle 2.6 does, and prints; 3.3 fails at the run
            raise UserError(f"--precision bf16: not with {OLD_PROGRAM}; export with --format paddle")
        if options.precision == "bf16" and not (options.use_mkldnn and "avx512_bf16" in runtime.cpu_flags()):
            raise UserError("--precision bf16: Paddle has it on a CPU with avx512_bf16 only, with --use_mkldnn True")
        if options.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {options.precision}: {self.version} has fp32 and bf16 on the CPU")
        config.disable_gpu()
        if options.use_mkldnn:
            config.enable_mkldnn()
        else:
            config.disable_mkldnn()
        if options.precision == "bf16":
            config.enable_mkldnn_bfloat16()
        config.set_cpu_math_library_num_threads(options.threads)

    def run(self, images: Any) -> list[Any]:
        """See `Backend`."""
        # Its predictor does not tell the model's size; what the run fails of does.
        with _running(self.version, images, "export again if that is not the model's size"):
            self._input.reshape(images.shape)
            self._input.copy_from_cpu(images)
            self._predictor.run()
            names = self._predictor.get_output_names()
            return [self._predictor.get_output_handle(name).copy_to_cpu() for name in names]


class OnnxRuntimeModel:
    """ONNX Runtime, with CUDA where it has that."""

    def __init__(self, folder: Path, options: Options) -> None:
        import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        if options.precision != "fp32":
            raise UserError(f"--precision {options.precision}: {self.version} runs the exported model in fp32 only")
        gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        if options.use_gpu and not gpu:
            warn("--use_gpu True: this ONNX Runtime has no CUDA; running on the CPU")
        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options.threads
        session.log_severity_level = 4  # none but fatal errors: the others are raised too
        providers: list[Any] = ["CPUExecutionProvider"]
        file = folder / "inference.onnx"
        try:
            # On stdout it says at length which of CUDA's libraries or which GPU it misses; the warning below is enough.
            with contextlib.redirect_stdout(io.StringIO()):
                if options.use_gpu and gpu:
                    onnxruntime.preload_dlls()
                    providers.insert(0, ("CUDAExecutionProvider", CUDA_OPTIONS))
                self._session = onnxruntime.InferenceSession(file, session, providers)
        except Exception as error:  # ONNX Runtime raises its own kinds
            raise UserError(f"{file}: {self.version} cannot load this model ({error})") from error
        self.device = "gpu" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        if options.use_gpu and gpu and self.device == "cpu":
            warn("--use_gpu True: ONNX Runtime finds no GPU, or not CUDA's libraries; running on the CPU")

    def run(self, images: Any) -> list[Any]:
        """See `Backend`."""
        _check_size(images, self._session.get_inputs()[0].shape[1:])
        with _running(self.version, images):
            return self._session.run(None, {"images": images})


class OpenvinoModel:
    """OpenVINO on the CPU."""

    device = "cpu"

    def __init__(self, folder: Path, options: Options) -> None:
        import openvino

        self.version = f"openvino {openvino.__version__.partition('-')[0]}"
        if options.use_gpu:
            warn("--use_gpu True: OpenVINO runs on no NVIDIA GPU; running on the CPU")
        self._core = openvino.Core()
        kinds = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if options.precision.upper() not in kinds:
            raise UserError(f"--precision {options.precision}: this CPU has none in {self.version}; use fp32")
        self._settings = {
            "INFERENCE_NUM_THREADS": options.threads,
            # It binds threads to the first cores, where those of another process of few threads would be bound too.
            "ENABLE_CPU_PINNING": options.threads >= runtime.available_cores(),
            "INFERENCE_PRECISION_HINT": options.precision.replace("fp", "f"),  # its own choice is bf16 where it can
            "PERFORMANCE_HINT": "LATENCY",
        }
        file = folder / "inference.onnx"
        try:
            self._model = self._core.read_model(file)
        except RuntimeError as error:
            raise UserError(f"{file}: {self.version} cannot load this model ({error})") from error
        self._size = [dimension.get_length() for dimension in list(self._model.input(0).partial_shape)[1:]]
        self._usual, self._winograd = options.usual_batches, options.winograd
        self._requests: dict[int, Any] = {}  # by number of pictures, made when first asked for

    def _request(self, pictures: int) -> Any:
        """For this many pictures, if that is usual, else for any number."""
        fixed = pictures if pictures in self._usual else ANY_NUMBER
        if fixed not in self._requests:
            model = self._model.clone()
            model.reshape([fixed, *self._size])
            if self._winograd and fixed != ANY_NUMBER:
                from deploy.openvino_graph import use_winograd  # of those who have OpenVINO

                use_winograd(model)
            self._requests[fixed] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        return self._requests[fixed]

    def run(self, images: Any) -> list[Any]:
        """See `Backend`."""
        _check_size(images, self._size)  # OpenVINO 2026.4 would read what is not there
        with _running(self.version, images):
            request = self._request(len(images))
            # infer() of OpenVINO 2026.4 does not tell when memory is short, and leaves the results of the run before.
            request.start_async([images], share_inputs=True)
            request.wait()
            return [request.get_output_tensor(i).data.copy() for i in range(3)]


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """The options that choose a runtime and set it up; `asked_for` reads them."""
    parser.add_argument("--backend", choices=tuple(FILES), default="paddle", help="runtime (%(default)s)")
    parser.add_argument("--use_gpu", type=boolean, default=False, help="True or False (%(default)s)")
    parser.add_argument("--use_mkldnn", type=boolean, default=True, help="paddle on a CPU: oneDNN (%(default)s)")
    parser.add_argument(
        "--use_tensorrt",
        type=boolean,
        default=False,
        help=f"paddle on a GPU with {OLD_PROGRAM}: TensorRT (%(default)s)",
    )
    parser.add_argument(
        "--winograd",
        type=boolean,
        default=False,
        help="openvino in fp32: faster on a CPU with AVX2 only, ten seconds later to start (%(default)s)",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="where the runtime has it (%(default)s)"
    )
    parser.add_argument("--cpu_threads", type=positive_int, help="threads on a CPU (all cores this process may use)")


def asked_for(args: argparse.Namespace, usual_batches: Collection[int]) -> Options:
    """What `add_runtime`'s options and `--max_batch_size` ask for. Call it before the runtime is imported."""
    return Options(
        use_gpu=args.use_gpu,
        threads=prepare_runtime(args.backend, args.cpu_threads, args.verbose),
        precision=args.precision,
        use_mkldnn=args.use_mkldnn,
        use_tensorrt=args.use_tensorrt,
        max_batch_size=args.max_batch_size,
        usual_batches=usual_batches,
        winograd=args.winograd,
    )


def prepare_runtime(backend: str, cpu_threads: int | None, verbose: bool = False) -> int:
    """Prepare the process for a runtime, before it is imported; how many threads it shall use on the CPU.

    Paddle is set up as `deploy.common.runtime` does it; the other runtimes work without Paddle.

    Raises:
        UserError: Paddle is asked for and not installed, or OMP_NUM_THREADS is no number.
    """
    given = str(cpu_threads or os.environ.get("OMP_NUM_THREADS", ""))
    first = given.partition(",")[0].strip()  # OpenMP takes a list: one number for each level of nested loops
    if first and (not first.isdecimal() or int(first) < 1):
        raise UserError(f"OMP_NUM_THREADS={given}: must be a whole number from 1; change it or give --cpu_threads")
    threads = int(first or runtime.available_cores())
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of what is empty or a list Paddle would make 1
    if backend == "paddle":
        with _importing(backend):
            runtime.import_paddle(verbose)
    return threads


@contextlib.contextmanager
def _importing(backend: str) -> Iterator[None]:
    """Turn an import that fails into a UserError."""
    try:
        yield
    except ImportError as error:
        advice = NO_PADDLE if backend == "paddle" else "pip install -r requirements-deploy.txt"
        raise UserError(f"--backend {backend}: cannot be imported ({error}); {advice}") from error


def _check_size(images: Any, size: list[int]) -> None:
    """Compare the pictures with what the model takes, (3, H, W)."""
    if list(images.shape[1:]) != size:
        raise UserError(f"the exported model takes pictures of {size}, not {list(images.shape[1:])}; export again")


@contextlib.contextmanager
def _running(version: str, images: Any, *advice: str) -> Iterator[None]:
    """Turn the failure of a run, of whatever kind the runtime raises, into a UserError that tells its reason."""
    try:
        yield
    except Exception as error:
        # Paddle 3 puts many lines around the one that begins with the kind of error; with Paddle 2.6 it is the first.
        reason = re.search(r"\w+Error: .*", str(error)) or re.match(r"\(\w+\) .*", str(error).lstrip())
        what = "; ".join((*advice, "run smaller batches if memory is short"))
        raise UserError(
            f"{version} failed on pictures {list(images.shape)} ({reason[0] if reason else error}); {what}"
        ) from error
