# make demo: set up, then train, evaluate, predict, export and infer on lite_data.
# make test: set up, then run the tests.
# make test-cluster: set up, Ray too, then run the tests that need it.
# make bench: set up, Ray too, and anomalib where it can be had, then measure; see benchmarks/README.md.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
DEMO = results/demo
BENCH_ENV = $(VENV)/anomalib
BENCH_PIP =
BENCH_ARGS =

.PHONY: bench demo test test-cluster lint clean

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The marker files say which requirements were installed; a changed file installs again.
$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-serve.txt requirements-deploy.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

$(VENV)/.installed-cluster: requirements-cluster.txt $(VENV)/.installed-dev
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-cluster.txt
	touch $@

demo: $(VENV)/.installed
	$(RUN) train.py -cfg ./configs/resnet18.yaml --data ./lite_data --exp_dir demo -cat bottle --epochs 20 --batch_size 8 --test_epochs 5
	$(RUN) eval.py -cfg ./configs/resnet18.yaml --data ./lite_data -cat bottle --exp_dir demo
	$(RUN) predict.py -cfg ./configs/resnet18.yaml --category bottle --image_path 'images/bottle_*.png' --exp_dir demo
	$(RUN) deploy/export_model.py -cfg ./configs/resnet18.yaml --category bottle --exp_dir demo --save_inference_dir $(DEMO)/inference
	$(RUN) deploy/infer.py --save_inference_dir $(DEMO)/inference --image_path 'images/bottle_*.png' --output_dir $(DEMO)/inference/pictures > $(DEMO)/scores.txt
	@echo
	@echo "demo done. AUROC on the test pictures of lite_data/bottle ($(DEMO)/eval.json):"
	@grep -m2 -E '"(image|pixel)_auroc"' $(DEMO)/eval.json
	@echo "scores of the exported model:"; cat $(DEMO)/scores.txt
	@echo "pictures: $(DEMO)/bottle/predictions, curves: $(DEMO)/bottle/curves.png"

test: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-cluster: $(VENV)/.installed-cluster
	$(RUN) -m pytest tests/test_cluster.py tests/test_score.py

bench: $(VENV)/.installed-cluster
	@$(MAKE) --no-print-directory $(BENCH_ENV)/.installed || echo "no anomalib here; benchmarks/README.md says what it needs"
	$(RUN) -m benchmarks $(BENCH_ARGS)

# anomalib in an environment of its own: its requirements are not ours.
$(BENCH_ENV)/.installed: requirements-bench.txt | $(VENV)/bin/python
	$(RUN) -m venv $(BENCH_ENV)
	$(BENCH_ENV)/bin/python -m pip install --disable-pip-version-check -q $(BENCH_PIP) -r requirements-bench.txt
	touch $@

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf results test_tipc/output
