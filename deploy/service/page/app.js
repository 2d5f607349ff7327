"use strict";

const AT_ONCE = 4; // uploads; enough to fill a batch, few enough for the order to be that of the files
const ATTEMPTS = 10; // when the server is busy

const element = (id) => document.getElementById(id);
const thresholds = new Map(); // by model; the user's once the slider was moved
const results = []; // of this session: what was asked, what came back, and the card and row that show it
const waiting = []; // those of them that were not sent yet
let sending = 0;
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
  results.forEach(show);
  showProgress();
}

// ---- models and thresholds

async function loadModels() {
  try {
    const answer = await fetch("v1/models");
    for (const model of (await answer.json()).models) {
      thresholds.set(model.name, model.image_threshold);
      element("model").append(new Option(model.name));
    }
    showThreshold();
  } catch {
    element("status").textContent = text.errors[0];
  }
}

function showThreshold() {
  const threshold = thresholds.get(element("model").value);
  element("threshold").value = threshold;
  element("threshold-value").textContent = threshold.toFixed(3);
}

function setThreshold() {
  thresholds.set(element("model").value, element("threshold").valueAsNumber);
  showThreshold();
  results.forEach(show); // the labels follow without asking the server
  showProgress();
}

function setOpacity() {
  const percent = element("opacity").value;
  element("opacity-value").textContent = `${percent}%`;
  document.documentElement.style.setProperty("--heat", percent / 100);
}

// ---- pictures

async function add(list) {
  const files = [...list]; // the list of an input empties when the input does
  await loaded;
  for (const file of files) {
    const card = element("card").content.firstElementChild.cloneNode(true);
    const row = document.createElement("tr");
    for (let i = 0; i < 7; i++) row.insertCell();
    const result = { file, card, row, model: element("model").value, clock: new Date() };
    const image = card.querySelector("img");
    image.onerror = () => {
      result.noPreview = true;
      show(result);
    };
    image.src = URL.createObjectURL(file);
    results.push(result);
    waiting.push(result);
    element("cards").prepend(card);
    element("rows").prepend(row);
    show(result);
  }
  element("session").hidden = results.length === 0;
  showProgress();
  while (sending < AT_ONCE && waiting.length > 0) send();
}

async function send() {
  sending += 1;
  while (waiting.length > 0) {
    const result = waiting.shift();
    Object.assign(result, await predict(result.file, result.model));
    if (result.map) {
      // Its score counts all the same, and the next pictures are sent.
      await drawHeat(result.card.querySelector("canvas"), result.map).catch(() => (result.noHeat = true));
    }
    show(result);
    showProgress();
  }
  sending -= 1;
}

// What the server says of a file: { score, map, milliseconds }, or { status, detail }.
async function predict(file, model) {
  const form = new FormData();
  form.append("map", "true");
  form.append("image", file);
  for (let attempt = 1; ; attempt++) {
    try {
      const answer = await fetch(`v1/models/${encodeURIComponent(model)}:predict`, { method: "POST", body: form });
      const said = await answer.json();
      if (answer.ok) return { score: said.score, map: said.map, milliseconds: said.time_ms.total };
      if (answer.status !== 503 || attempt === ATTEMPTS) return { status: answer.status, detail: said.detail };
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    } catch (error) {
      return { status: 0, detail: error.message };
    }
  }
}

// A grey PNG in base64 -> its values in colours, blue for 0 to red for 1, as in the pictures of infer.py.
async function drawHeat(canvas, png) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const value = pixels.data[i] / 255;
    [3, 2, 1].forEach((peak, channel) => {
      pixels.data[i + channel] = 255 * Math.min(Math.max(1.5 - Math.abs(4 * value - peak), 0), 1);
    });
  }
  context.putImageData(pixels, 0, 0);
}

// ---- what is shown

function isScored(result) {
  return result.score !== undefined;
}

function isFailed(result) {
  return result.status !== undefined;
}

function label(result) {
  return result.score > thresholds.get(result.model) ? "Anomaly" : "Normal";
}

function errorText(result) {
  return `${text.errors[result.status] ?? text.errors.other} (${result.detail})`;
}

// Every file name goes in as text, never as HTML.
function show(result) {
  const { card, row } = result;
  const threshold = thresholds.get(result.model);
  const state = isScored(result) ? label(result) : isFailed(result) ? "failed" : "waiting";
  card.dataset.state = row.dataset.state = state;
  card.querySelector("h3").textContent = result.file.name;
  card.querySelector("strong").textContent = text[state];
  card.querySelector(".error").textContent = isFailed(result) ? errorText(result) : "";
  const cells = [result.file.name, result.model, "", "", text[state], "", result.clock.toLocaleTimeString(language)];
  if (isScored(result)) {
    const score = result.score.toFixed(3);
    const milliseconds = result.milliseconds.toFixed(0);
    cells.splice(2, 4, score, threshold.toFixed(3), text[state], milliseconds);
    card.querySelector(".score").textContent = score;
    card.querySelector(".time").textContent = `${milliseconds} ms`;
    card.querySelector(".bar").ariaLabel = text.bar(score, threshold.toFixed(3));
    card.querySelector(".bar i").style.width = `${100 * result.score}%`;
    card.querySelector(".bar b").style.left = `${100 * threshold}%`;
    if (result.noHeat) card.querySelector(".error").textContent = text.noHeat;
    if (result.noPreview) {
      card.classList.add("no-preview");
      card.querySelector(".error").textContent = text.noPreview;
    }
  }
  cells.forEach((cell, i) => {
    row.cells[i].textContent = cell;
  });
}

function showProgress() {
  const scored = results.filter(isScored);
  const errors = results.filter(isFailed).length;
  const anomalies = scored.filter((result) => label(result) === "Anomaly").length;
  const all = results.length;
  element("status").textContent = all ? text.progress(scored.length + errors, all, anomalies, errors) : "";
}

// ---- the session

function csv() {
  const columns = ["file", "model", "score", "threshold", "label", "milliseconds", "clock", "error"];
  const lines = results.map((result) =>
    isScored(result)
      ? [result.score, thresholds.get(result.model), text[label(result)], result.milliseconds.toFixed(1)]
      : ["", "", "", ""],
  );
  const table = results.map((result, i) => [
    result.file.name,
    result.model,
    ...lines[i],
    result.clock.toISOString(),
    isFailed(result) ? errorText(result) : "",
  ]);
  return [columns.map((column) => text[column]), ...table].map((cells) => cells.map(quoted).join(",")).join("\r\n");
}

// A cell that begins like a formula gets an apostrophe: a spreadsheet would run what a file's name says.
function quoted(cell) {
  const safe = typeof cell === "string" && /^[=+\-@\t\r]/.test(cell) ? `'${cell}` : String(cell);
  return `"${safe.replaceAll('"', '""')}"`;
}

function download() {
  const link = document.createElement("a");
  // The mark at the start tells spreadsheets that this is UTF-8.
  link.href = URL.createObjectURL(new Blob(["\ufeff", csv(), "\r\n"], { type: "text/csv" }));
  link.download = `fastflow-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function clear() {
  for (const result of results) {
    URL.revokeObjectURL(result.card.querySelector("img").src);
    result.card.remove();
    result.row.remove();
  }
  results.length = waiting.length = 0;
  element("session").hidden = true;
  showProgress();
  element("pick").focus(); // the button that had the focus is gone
}

// ---- the camera

async function openCamera() {
  if (!navigator.mediaDevices) return element("photo").click(); // only a secure page is given the camera itself
  try {
    const video = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } };
    element("video").srcObject = await navigator.mediaDevices.getUserMedia({ video });
    element("capture").disabled = true; // until there is a picture to take
    element("camera").showModal();
  } catch (error) {
    element("status").textContent = `${text.noCamera} (${error.message})`;
  }
}

function capture() {
  const video = element("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const name = `camera-${new Date().toISOString().slice(11, 23).replaceAll(/[:.]/g, "")}.jpg`;
  canvas.toBlob((blob) => add([new File([blob], name, { type: blob.type })]), "image/jpeg", 0.95);
}

function closeCamera() {
  for (const track of element("video").srcObject.getTracks()) track.stop();
  element("video").srcObject = null;
}

// ---- wiring

function pickFrom(input) {
  input.addEventListener("change", () => {
    add(input.files);
    input.value = ""; // so that the same file can be picked again
  });
}

pickFrom(element("files"));
pickFrom(element("photo"));
element("pick").addEventListener("click", () => element("files").click());
element("shoot").addEventListener("click", openCamera);
element("video").addEventListener("playing", () => {
  element("capture").disabled = false;
});
element("capture").addEventListener("click", capture);
element("camera-close").addEventListener("click", () => element("camera").close());
element("camera").addEventListener("close", closeCamera); // Escape ends here too
element("model").addEventListener("change", showThreshold);
element("threshold").addEventListener("input", setThreshold);
element("opacity").addEventListener("input", setOpacity);
element("csv").addEventListener("click", download);
element("clear").addEventListener("click", clear);
element("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  remembered((storage) => storage.setItem("language", language));
  translate();
});

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
  add(event.dataTransfer.files);
});

setOpacity();
translate();
const loaded = loadModels();
