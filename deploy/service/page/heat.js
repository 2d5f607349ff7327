"use strict";

// How an anomaly map is drawn: nothing where a pixel's score is not above the pixel threshold, colours above it, and a
// line around those.

// Matplotlib's colour map plasma, which colour-blind people can read too: every fifth of its 256 colours, as RRGGBB.
const PLASMA = `
  0d0887 1b068d 260591 2f0596 38049a 41049d 4903a0 5102a3 5901a5 6100a7 6900a8 7100a8 7801a8
  8004a8 8707a6 8e0ca4 9511a1 9c179e a21d9a a82296 ae2892 b42e8d ba3388 bf3984 c43e7f c9447a
  cd4a76 d24f71 d6556d da5b69 de6164 e26660 e66c5c e97257 ed7953 f07f4f f3854b f58c46 f79342
  f99a3e fba139 fca835 fdaf31 feb72d febe2a fdc627 fcce25 fbd724 f8df25 f6e826 f3f027 f0f921`
  .trim()
  .split(/\s+/)
  .map((hex) => [0, 2, 4].map((i) => Number.parseInt(hex.slice(i, i + 2), 16)));

// The colour of a place on the map from 0 to 1: red, green, blue.
function colour(place) {
  const at = place * (PLASMA.length - 1);
  const first = Math.min(Math.floor(at), PLASMA.length - 2);
  return PLASMA[first].map((value, i) => value + (at - first) * (PLASMA[first + 1][i] - value));
}

// A grey PNG in base64 -> the map { image, width, height, values }; values from 0 to 255 for scores from 0 to 1.
async function readMap(png) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const { width, height } = image;
  const { data } = grey(document.createElement("canvas"), image, width, height);
  return { image, width, height, values: Uint8Array.from({ length: width * height }, (_, i) => data[4 * i]) };
}

function grey(canvas, image, width, height) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// The colours run from the pixel threshold to a score of 1, as in the pictures of infer.py. `side` is the canvas's longer
// one in pixels: where it is longer than the map's, the scores between the map's pixels count too.
function drawHeat(canvas, { image, width, height }, threshold, side) {
  const scale = side / Math.max(width, height);
  const colours = Array.from({ length: 256 }, (_, value) => {
    const above = value / 255 - threshold;
    return above > 0 ? [...colour(above / (1 - threshold)), 255] : [0, 0, 0, 0];
  });
  const lookup = new Uint32Array(new Uint8ClampedArray(colours.flat()).buffer); // four bytes at a time
  const pixels = grey(canvas, image, Math.ceil(scale * width), Math.ceil(scale * height));
  const drawn = new Uint32Array(pixels.data.buffer);
  for (let i = 0; i < drawn.length; i++) drawn[i] = lookup[pixels.data[4 * i]];
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// The line around what is above the threshold, as the path of an SVG: through each square between four neighbours go
// the pieces that part the ones above from the others ("marching squares"). Beyond the edge nothing is above.
function outline({ width, height, values }, threshold) {
  const level = 255 * threshold;
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : values[y * width + x]);
  const within = (place, most) => Math.min(Math.max(place + 0.5, 0), most).toFixed(2); // values are those of centres
  const path = [];
  for (let y = -1; y < height; y++) {
    for (let x = -1; x < width; x++) {
      const scores = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)];
      if (scores.every((score) => score > level === scores[0] > level)) continue; // nearly all
      const corners = [
        [x, y, scores[0]],
        [x + 1, y, scores[1]],
        [x + 1, y + 1, scores[2]],
        [x, y + 1, scores[3]],
      ];
      const crossings = [];
      corners.forEach(([x0, y0, from], i) => {
        const [x1, y1, to] = corners[(i + 1) % 4];
        if (from > level === to > level) return;
        const share = (level - from) / (to - from);
        crossings.push(`${within(x0 + share * (x1 - x0), width)} ${within(y0 + share * (y1 - y0), height)}`);
      });
      for (let i = 0; i < crossings.length; i += 2) path.push(`M${crossings[i]}L${crossings[i + 1]}`);
    }
  }
  return path.join("");
}

// The map over a picture: in its canvas and its SVG.
function drawMap(picture, map, threshold, side) {
  drawHeat(picture.querySelector("canvas"), map, threshold, side);
  const drawing = picture.querySelector("svg");
  drawing.setAttribute("viewBox", `0 0 ${map.width} ${map.height}`);
  drawing.querySelector("path").setAttribute("d", outline(map, threshold));
}

// The boxes of regions over their map, `group` of its SVG; `size` is the height and width of the picture, in whose pixels
// they are. Hovering over one shows what `tell` makes of its number and itself.
function drawRegions(group, map, [height, width], regions, tell) {
  const boxes = regions.map((region, i) => {
    const [rect, title] = ["rect", "title"].map((kind) => document.createElementNS(group.namespaceURI, kind));
    const scales = { x: map.width / width, y: map.height / height };
    const [x, y, wide, high] = region.box;
    const places = { x: x * scales.x, y: y * scales.y, width: wide * scales.x, height: high * scales.y };
    for (const [name, place] of Object.entries(places)) rect.setAttribute(name, place);
    title.textContent = tell(i + 1, region);
    rect.append(title);
    return rect;
  });
  group.replaceChildren(...boxes);
}

// A bar with the colours from left to right.
function drawLegend(bar) {
  bar.style.background = `linear-gradient(to right, ${PLASMA.map((rgb) => `rgb(${rgb})`)})`;
}
