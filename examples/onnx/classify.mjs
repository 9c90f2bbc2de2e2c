// Classify one image with a shipped head: node classify.mjs model.onnx image.ppm
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

// From node_modules beside this file or above it, or from .node of a checkout of featcache.
const here = dirname(fileURLToPath(import.meta.url));
const paths = [here, join(here, "..", "..", ".node")];
const ort = createRequire(import.meta.url)(
  createRequire(import.meta.url).resolve("onnxruntime-web", { paths })
);

const [modelPath, imagePath] = process.argv.slice(2);
const bytes = new Uint8Array(await readFile(modelPath));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });

// In a browser: getImageData of a canvas, without its alpha.
const { width, height, pixels } = readPpm(await readFile(imagePath));
const image = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
const { probabilities } = await session.run({ image });
const names = JSON.parse(metadata(bytes).classes);
names.forEach((name, index) => console.log(name, probabilities.data[index].toFixed(6)));

function readPpm(data) {
  const head = /^P6\s+(\d+)\s+(\d+)\s+255\s/.exec(data.subarray(0, 64).toString("latin1"));
  if (!head) throw new Error(`${imagePath}: expected a PPM image, P6; convert it first`);
  const [width, height] = [Number(head[1]), Number(head[2])];
  const start = head[0].length;
  return { width, height, pixels: Uint8Array.from(data.subarray(start, start + width * height * 3)) };
}

// The metadata of an ONNX file, which onnxruntime-web does not tell: field 14 of the message, of
// entries with a name (1) and a text (2).
function metadata(bytes) {
  const found = {};
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const [name, text] = [...fields(entry)].map(([, part]) => new TextDecoder().decode(part));
    found[name] = text;
  }
  return found;
}

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127);
    return value;
  };
  while (at < bytes.length) {
    const tag = varint();
    if (tag % 8 === 0) varint();
    else if (tag % 8 === 2) {
      const length = varint();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else at += tag % 8 === 1 ? 8 : 4;
  }
}
