"use strict";

// The page as a whole: its language, models and thresholds, and what is sent to the server.

const AT_ONCE = 4; // uploads; enough to fill a batch, few enough for the order to be that of the files
const ATTEMPTS = 10; // when the server is busy

const element = (id) => document.getElementById(id);
const models = new Map(); // by name: what the server says of it, and `threshold`, the user's once the slider was moved
const waiting = []; // results that were not sent yet
let sending = 0;
let notice = () => ""; // what is said below the settings, in the page's language
let language = chosenLanguage();
let text = TEXTS[language];

// ---- language

function chosenLanguage() {
  const stored = remembered((storage) => storage.getItem("language"));
  return stored in TEXTS ? stored : navigator.language.startsWith("zh") ? "zh" : "en";
}

// Where the browser lets pages store nothing, even to look for it throws; then the choice holds until the page is left.
function remembered(use) {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

function translate() {
  text = TEXTS[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = text[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = text[node.dataset.label];
  element("language").textContent = text.language;
  element("language").lang = language === "zh" ? "en" : "zh-CN";
  say(notice);
  results.forEach(show);
  arrange();
}

function say(what) {
  notice = what;
  element("notice").textContent = what();
}

// ---- models and thresholds

async function loadModels() {
  try {
    const answer = await fetch("v1/models");
    for (const model of (await answer.json()).models) {
      if (!models.has(model.name)) element("model").append(new Option(model.name));
      models.set(model.name, { ...model, threshold: model.image_threshold });
    }
    showModel();
  } catch {
    say(() => text.errors[0]);
  }
}

function showModel() {
  const model = models.get(element("model").value);
  element("threshold").value = model.threshold;
  element("threshold-value").textContent = model.threshold.toFixed(3);
  element("reset").disabled = model.threshold === model.image_threshold;
  element("pixel-threshold").textContent = model.pixel_threshold.toFixed(3);
}

function setThreshold(choose) {
  const model = models.get(element("model").value);
  model.threshold = choose(model);
  showModel();
  results.forEach(show); // the labels follow without asking the server
  arrange();
}

function setOpacity() {
  const percent = element("opacity").value;
  element("opacity-value").textContent = `${percent}%`;
  document.documentElement.style.setProperty("--heat", percent / 100);
}

function setBoxes() {
  document.documentElement.classList.toggle("boxes", element("boxes").checked);
}

// ---- pictures

async function add(found, remark = () => "") {
  say(remark);
  await loaded;
  if (models.size === 0) await loadModels(); // the server may be there by now
  if (models.size === 0) return;
  for (const source of found) {
    const result = newResult(source, element("model").value);
    results.push(result);
    waiting.push(result);
    show(result);
  }
  arrange();
  while (sending < AT_ONCE && waiting.length > 0) send();
}

async function send() {
  sending += 1;
  while (waiting.length > 0) {
    const result = waiting.shift();
    Object.assign(result, await predict(result.file, result.model));
    if (result.png) await prepareMap(result);
    show(result);
    arrange();
    if (result === large && element("large").open) enlarge(result);
  }
  sending -= 1;
}

// What the server says of a file: its score and map, or { status, detail }.
async function predict(file, model) {
  const form = new FormData();
  form.append("map", "true");
  form.append("image", file, "image"); // names of files in folders would be paths, which the server does not take
  for (let attempt = 1; ; attempt++) {
    try {
      const answer = await fetch(`v1/models/${encodeURIComponent(model)}:predict`, { method: "POST", body: form });
      const said = await answer.json().catch(() => ({})); // what stands between the two may answer in another form
      if (answer.ok && said.size) {
        const { score, orientation, map: png, size, regions } = said;
        return { score, orientation, png, size, regions, ratio: size[1] / size[0], milliseconds: said.time_ms.total };
      }
      if (answer.status !== 503 || attempt === ATTEMPTS) return { status: answer.status, detail: said.detail };
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    } catch {
      return { status: 0 }; // the browser does not tell pages more
    }
  }
}

// A picture whose map cannot be drawn has its score all the same, and the next ones are sent.
async function prepareMap(result) {
  const threshold = models.get(result.model).pixel_threshold;
  try {
    result.map = await readMap(result.png);
    result.noPixel = !result.map.values.some((value) => value / 255 > threshold);
    drawMap(result.card.querySelector(".picture"), result.map, threshold, 320);
  } catch {
    result.noHeat = true;
    result.map = null;
  }
  delete result.png;
}

// ---- wiring: settings

element("model").addEventListener("change", showModel);
element("threshold").addEventListener("input", () => setThreshold(() => element("threshold").valueAsNumber));
element("reset").addEventListener("click", () => setThreshold((model) => model.image_threshold));
element("opacity").addEventListener("input", setOpacity);
element("boxes").addEventListener("change", setBoxes);
element("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  remembered((storage) => storage.setItem("language", language));
  translate();
});

// ---- wiring: where pictures come from
for (const id of ["files", "folder", "photo"]) element(id).addEventListener("change", () => addPicked(element(id)));
element("pick").addEventListener("click", () => element("files").click());
element("pick-folder").addEventListener("click", () => element("folder").click());
element("shoot").addEventListener("click", openCamera);
element("video").addEventListener("playing", () => {
  element("capture").disabled = false;
});
element("capture").addEventListener("click", capture);
element("camera-close").addEventListener("click", () => element("camera").close());
element("camera").addEventListener("close", closeCamera); // Escape ends here too

// Pictures may be dropped anywhere; the frame shows where they are expected.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) element("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  addDropped(event.dataTransfer);
});

// ---- wiring: results
for (const id of ["sort", "filter"]) element(id).addEventListener("change", arrange);
element("csv").addEventListener("click", download);
element("clear").addEventListener("click", clear);
element("previous").addEventListener("click", () => go(-1));
element("next").addEventListener("click", () => go(1));
element("large-close").addEventListener("click", () => element("large").close());
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && element("large").open) go(step);
});
element("large").querySelector("img").addEventListener("error", () => {
  if (large.noPreview) return;
  large.noPreview = true; // its card was not looked at yet
  show(large);
  enlarge(large);
});
element("large").addEventListener("click", (event) => {
  if (event.target === element("large")) element("large").close(); // beside it
});
element("large").addEventListener("close", () => {
  element("large").querySelector("img").removeAttribute("src");
  large.card.querySelector(".enlarge").focus(); // of the picture that was looked at last
});

for (const bar of document.querySelectorAll(".colours")) drawLegend(bar);
setOpacity();
setBoxes(); // as the browser remembers it
translate();
const loaded = loadModels();
