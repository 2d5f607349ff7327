"use strict";

// The results of this session: cards, the enlarged picture, the table, and its download.

const results = []; // what was asked, what came back, and the card and row that show it; the oldest first
let large = null; // the result that is shown enlarged

// { file, name } -> a result that waits, with its card and row.
function newResult({ file, name }, model) {
  const card = element("card").content.firstElementChild.cloneNode(true);
  const row = document.createElement("tr");
  for (let i = 0; i < 7; i++) row.insertCell();
  const result = { file, name, model, card, row, url: URL.createObjectURL(file), clock: new Date() };
  const image = card.querySelector("img");
  image.onload = () => {
    result.ratio ??= image.naturalWidth / image.naturalHeight; // until the server says its size
    showPicture(card, result);
  };
  image.onerror = () => {
    result.noPreview = true;
    show(result);
  };
  image.src = result.url;
  card.querySelector(".picture").addEventListener("click", () => enlarge(result)); // its button's too
  return result;
}

function isScored(result) {
  return result.score !== undefined;
}

function isFailed(result) {
  return result.status !== undefined;
}

// Also the name of its text and of its colour.
function state(result) {
  if (isFailed(result)) return "failed";
  if (!isScored(result)) return "waiting";
  return result.score > models.get(result.model).threshold ? "Anomaly" : "Normal";
}

// What is wrong, in the words of a language; what the server says is in English where its sentence is not known.
function errorText({ status, detail }, words) {
  const what = words.errors[status] ?? words.errors.other;
  const said = (detail ?? "").replace(/^image: /, "");
  const known = words.details.find(([pattern]) => pattern.test(said));
  const more = known ? said.replace(...known) : said;
  return more ? words.because(what, more) : what;
}

// ---- cards and rows

// Every file name goes in as text, never as HTML.
function show(result) {
  const { card, row, name, model } = result;
  const threshold = models.get(model).threshold.toFixed(3);
  card.dataset.state = row.dataset.state = state(result);
  showName(card.querySelector("h3"), name);
  card.querySelector("strong").textContent = text[state(result)];
  card.querySelector(".model").textContent = model;
  card.querySelector(".enlarge").ariaLabel = text.enlarge(name);
  card.querySelector(".error").textContent = remark(result);
  showPicture(card, result);
  const cells = [name, model, "", "", text[state(result)], "", result.clock.toLocaleTimeString(language)];
  if (isScored(result)) {
    const score = result.score.toFixed(3);
    const milliseconds = result.milliseconds.toFixed(0);
    cells.splice(2, 4, score, threshold, text[state(result)], milliseconds);
    card.querySelector(".score").textContent = score;
    card.querySelector(".time").textContent = `${milliseconds} ms`;
    card.querySelector(".bar").ariaLabel = text.bar(score, threshold);
    card.querySelector(".bar i").style.width = `${100 * result.score}%`;
    card.querySelector(".bar b").style.left = `${100 * threshold}%`;
  }
  cells.forEach((cell, i) => {
    row.cells[i].textContent = cell;
  });
  showName(row.cells[0], name);
}

// As text, which may be broken after each folder.
function showName(node, name) {
  node.replaceChildren(...name.split(/(?<=\/)/).flatMap((part) => [part, document.createElement("wbr")]));
}

function remark(result) {
  if (isFailed(result)) return errorText(result, text);
  if (!isScored(result)) return "";
  if (result.noHeat) return text.noHeat;
  if (result.noPreview) return text.noPreview;
  return result.noPixel && state(result) === "Anomaly" ? text.noPixel : "";
}

// Of the space and the turn of a picture: its size and its orientation are the server's words, whatever the browser
// makes of the file. Until they come it is the browser that turns it.
function showPicture(place, { ratio, orientation, noPreview, map, size, regions }) {
  const picture = place.querySelector(".picture");
  if (ratio) picture.style.setProperty("--ratio", ratio);
  if (orientation) picture.dataset.orientation = orientation;
  else delete picture.dataset.orientation;
  picture.classList.toggle("no-preview", Boolean(noPreview));
  picture.classList.toggle("no-map", !map);
  if (map) drawRegions(picture.querySelector("g"), map, size, regions, text.region);
}

// Sorts and filters, and counts. Only what is out of place is moved: what is moved loses the focus.
function arrange() {
  const order = [...results].reverse();
  const rank = { Anomaly: 0, failed: 1, Normal: 2, waiting: 3 };
  if (element("sort").value === "anomalies") {
    order.sort((a, b) => rank[state(a)] - rank[state(b)] || (b.score ?? 0) - (a.score ?? 0));
  }
  const wanted = { all: () => true, Anomaly: (name) => name === "Anomaly", failed: (name) => name === "failed" };
  order.forEach((result, i) => {
    for (const [parent, child] of [
      [element("cards"), result.card],
      [element("rows"), result.row],
    ]) {
      if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
      child.hidden = !wanted[element("filter").value](state(result));
    }
  });
  const count = (name) => results.filter((result) => state(result) === name).length;
  const all = results.length;
  const progress = text.progress(all - count("waiting"), all, count("Anomaly"), count("failed"));
  element("status").textContent = all > 0 ? progress : "";
  element("session").hidden = all === 0;
}

// ---- the enlarged picture

function enlarge(result) {
  large = result;
  const place = element("large");
  const model = models.get(result.model);
  place.dataset.state = state(result);
  showName(place.querySelector("h2"), result.name);
  place.querySelector("img").src = result.url;
  place.querySelector("strong").textContent = text[state(result)];
  place.querySelector(".score").textContent = isScored(result) ? result.score.toFixed(3) : "";
  place.querySelector(".model").textContent = result.model;
  place.querySelector(".error").textContent = remark(result);
  place.querySelector(".from").textContent = model.pixel_threshold.toFixed(3);
  showPicture(place, result);
  if (result.map) drawMap(place.querySelector(".picture"), result.map, model.pixel_threshold, 1024);
  element("previous").disabled = !beside(-1);
  element("next").disabled = !beside(1);
  if (!place.open) place.showModal();
}

// The result whose card stands before or after the enlarged one's, among those that are shown and have a picture.
function beside(step) {
  const shown = [...element("cards").children].filter((card) => !card.hidden && card.dataset.state !== "failed");
  const card = shown[shown.indexOf(large.card) + step];
  return results.find((result) => result.card === card);
}

function go(step) {
  const result = beside(step);
  if (result) enlarge(result);
}

// ---- the download and the end of a session

function csv() {
  const words = TEXTS.en; // programs read it, whatever the page's language
  const columns = ["file", "model", "score", "threshold", "label", "milliseconds", "clock", "error"];
  const table = results.map((result) => [
    result.name,
    result.model,
    ...(isScored(result)
      ? [result.score, models.get(result.model).threshold, words[state(result)], result.milliseconds.toFixed(1)]
      : ["", "", "", ""]),
    result.clock.toISOString(),
    isFailed(result) ? errorText(result, words) : "",
  ]);
  return [columns.map((column) => words[column]), ...table].map((cells) => cells.map(quoted).join(",")).join("\r\n");
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
    URL.revokeObjectURL(result.url);
    result.card.remove();
    result.row.remove();
  }
  results.length = waiting.length = 0;
  arrange();
  element("pick").focus(); // the button that had the focus is gone
}
