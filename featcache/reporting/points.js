/* The points of a map: unpacked from the page, and found again by where they lie. */
"use strict";

const featcache = {};

/** Unpack what _points.encode packed: planes of bytes, then the ids. */
featcache.decode = async (told) => {
  const packed = Uint8Array.from(atob(told.block), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const points = {};
  let at = 0;
  for (const [name, width, count] of told.arrays) {
    const values = new Uint32Array(count);
    for (let byte = 0; byte < width; byte += 1, at += count) {
      for (let i = 0; i < count; i += 1) values[i] |= bytes[at + i] << (8 * byte);
    }
    points[name] = values;
  }
  points.ids = new TextDecoder().decode(bytes.subarray(at)).split("\0");
  points.n = told.n;
  points.k = told.k;
  return points;
};

/** A grid of cells over the unit square: the point under the pointer, without looking at all. */
featcache.Grid = class {
  constructor(x, y) {
    const side = Math.max(1, Math.min(256, Math.round(Math.sqrt(x.length / 4))));
    this.x = x;
    this.y = y;
    this.side = side;
    const cells = new Uint32Array(x.length);
    this.first = new Uint32Array(side * side + 1);
    for (let i = 0; i < x.length; i += 1) {
      cells[i] = this.column(y[i]) * side + this.column(x[i]);
      this.first[cells[i] + 1] += 1;
    }
    for (let cell = 0; cell < side * side; cell += 1) this.first[cell + 1] += this.first[cell];
    this.members = new Uint32Array(x.length);
    const next = this.first.slice();
    for (let i = 0; i < x.length; i += 1) {
      this.members[next[cells[i]]] = i;
      next[cells[i]] += 1;
    }
  }

  column(value) {
    return Math.max(0, Math.min(this.side - 1, Math.floor(value * this.side)));
  }

  /** The nearest of the visible points within a radius; -1 where there is none. */
  nearest(x, y, radius, visible) {
    let best = -1;
    let least = radius * radius;
    for (let row = this.column(y - radius); row <= this.column(y + radius); row += 1) {
      for (let column = this.column(x - radius); column <= this.column(x + radius); column += 1) {
        const cell = row * this.side + column;
        for (let place = this.first[cell]; place < this.first[cell + 1]; place += 1) {
          const i = this.members[place];
          const distance = (this.x[i] - x) ** 2 + (this.y[i] - y) ** 2;
          if (visible[i] && distance < least) {
            least = distance;
            best = i;
          }
        }
      }
    }
    return best;
  }
};

/** Thumbnails: sprites of 32 pixels on sheets of 1,024, decoded when one is wanted. */
featcache.Sprites = class {
  constructor(key, count) {
    this.key = key;
    this.count = count;
    this.sheets = new Map();
  }

  sheet(number) {
    let image = this.sheets.get(number);
    if (image) this.sheets.delete(number); // and again in the end: the oldest go first
    else {
      image = new Image();
      image.src = document.getElementById(`${this.key}-sheet-${number}`).textContent;
      image.ready = image.decode();
      if (this.sheets.size >= 24) this.sheets.delete(this.sheets.keys().next().value);
    }
    this.sheets.set(number, image);
    return image;
  }

  /** Return a canvas that shows the image of a point as soon as it is decoded. */
  canvas(i) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 32;
    canvas.className = "thumb";
    const image = this.sheet(Math.floor(i / 1024));
    const place = i % 1024;
    image.ready.then(() => {
      const [left, top] = [32 * (place % 32), 32 * Math.floor(place / 32)];
      canvas.getContext("2d").drawImage(image, left, top, 32, 32, 0, 0, 32, 32);
      canvas.dataset.drawn = "";
    });
    return canvas;
  }
};
