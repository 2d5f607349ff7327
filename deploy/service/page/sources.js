"use strict";

// Where pictures come from: files and folders that are picked or dropped, and the camera. Each is { file, name }, the
// name with the folders it was found in.

const PICTURE = /(^|\/)[^./][^/]*\.(png|jpe?g|bmp|tiff?|webp)$/i; // not hidden; as the server's commands take folders

// Files that were named are taken at their word: the server says what is wrong with them. Of folders the pictures.
function addPicked(input) {
  const found = [...input.files].map((file) => ({ file, name: file.webkitRelativePath || file.name }));
  input.value = ""; // so that the same can be picked again
  return input.webkitdirectory ? addFolders(found) : add(found);
}

async function addDropped(transfer) {
  const files = [...transfer.files];
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // gone after a wait
  if (!entries.some((entry) => entry.isDirectory)) return add(files.map((file) => ({ file, name: file.name })));
  const found = await Promise.all(entries.map(walk));
  return addFolders(found.flat());
}

function addFolders(found) {
  const pictures = found.filter(({ name }) => PICTURE.test(name));
  pictures.sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  return add(pictures, () => text.taken(pictures.length, found.length - pictures.length));
}

// Everything below an entry of a file system; what cannot be read has no file.
async function walk(entry) {
  const name = entry.fullPath.slice(1);
  try {
    if (entry.isFile) return [{ name, file: await new Promise((done, fail) => entry.file(done, fail)) }];
    const reader = entry.createReader();
    const found = [];
    for (;;) {
      const some = await new Promise((done, fail) => reader.readEntries(done, fail)); // a hundred at a time
      if (some.length === 0) return found;
      for (const below of some) found.push(...(await walk(below)));
    }
  } catch {
    return [{ name: "" }];
  }
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
    say(() => text.noCamera[error.name] ?? text.noCamera.other);
  }
}

function capture() {
  const video = element("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const name = `camera-${new Date().toISOString().slice(11, 23).replaceAll(/[:.]/g, "")}.jpg`;
  canvas.toBlob((blob) => add([{ file: new File([blob], name, { type: blob.type }), name }]), "image/jpeg", 0.95);
}

function closeCamera() {
  for (const track of element("video").srcObject.getTracks()) track.stop();
  element("video").srcObject = null;
}
