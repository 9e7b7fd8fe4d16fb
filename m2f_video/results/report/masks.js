// Masks: run lengths that are inflated chunk by chunk when they are needed, and painted pixel for pixel.

const MOST_CHUNKS = 12; // that stay inflated, of a result

/** Text of an element that holds data. */
function dataOf(id) {
  return document.getElementById(id)?.textContent ?? "";
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}

async function inflate(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Numbers of each frame: one Uint32Array of `count` for each of some things. */
async function numbersOf(id, count) {
  const all = new Uint32Array(await inflate(dataOf(id)));
  return Array.from({ length: count ? all.length / count : 0 }, (_, row) => all.subarray(row * count, (row + 1) * count));
}

/** The masks of one result. Of a frame there is a line for each mask, empty where it is absent. */
class MaskStore {
  constructor(result, keys, size, count) {
    Object.assign(this, { result, keys, size, count });
    this.chunks = new Map(); // number -> lines, or a promise of them; the one used last is the last
  }

  /** Run lengths of all masks in a frame; null while they are not inflated. */
  at(frame) {
    const number = Math.floor(frame / this.size);
    const lines = this.chunks.get(number);
    if (!Array.isArray(lines)) return null;
    this.chunks.delete(number);
    this.chunks.set(number, lines);
    const next = frame + Math.floor(this.size / 2); // so that playing does not wait for it
    if (next < this.count && Math.floor(next / this.size) !== number) this.load(next);
    const first = (frame % this.size) * this.keys;
    return lines.slice(first, first + this.keys);
  }

  /** Have the masks of a frame inflated. */
  async load(frame) {
    const number = Math.floor(frame / this.size);
    if (!this.chunks.has(number)) {
      this.chunks.set(number, this.#inflated(number));
      for (const old of this.chunks.keys()) {
        if (this.chunks.size <= MOST_CHUNKS) break;
        this.chunks.delete(old);
      }
    }
    await this.chunks.get(number);
  }

  async #inflated(number) {
    const text = new TextDecoder("ascii").decode(await inflate(dataOf(`masks-${this.result}-${number}`)));
    const lines = text.split("\n");
    if (this.chunks.has(number)) this.chunks.set(number, lines);
    return lines;
  }
}

let longest = new Int32Array(0); // of the runs in each column of the mask that is painted
let topOfLongest = new Int32Array(0);

/**
 * Paint a mask: give its pixels this number.
 *
 * Run lengths are COCO's: numbers of five bits a character from the lowest on, of which the fourth and later ones are
 * differences to the last but one; they go down the columns, from left to right, and begin with background.
 *
 * @returns {{x: number, y: number}} where a name belongs: over the middle of its body, whatever specks it has
 */
function paintMask(counts, owner, width, height, number) {
  if (longest.length < width) [longest, topOfLongest] = [new Int32Array(width), new Int32Array(width)];
  longest.fill(0);
  let place = 0;
  let before = 0; // the run before, and the one before that
  let beforeThat = 0;
  for (let at = 0, index = 0; at < counts.length; index++) {
    let run = 0;
    let shift = 0;
    let code;
    do {
      code = counts.charCodeAt(at++) - 48;
      run |= (code & 31) << shift;
      shift += 5;
    } while (code & 32 && at < counts.length);
    if (code & 16) run |= -1 << shift;
    if (index > 2) run += beforeThat;
    [beforeThat, before] = [before, run];
    if (index % 2) paintRun(place, place + run, owner, width, height, number);
    place += run;
  }
  let weights = 0;
  let sum = 0;
  for (let x = 0; x < width; x++) {
    weights += longest[x] ** 2;
    sum += x * longest[x] ** 2;
  }
  let x = Math.round(sum / weights);
  for (let away = 1; !longest[x]; away++) x += away % 2 ? away : -away; // of a mask in two parts the middle is empty
  return { x, y: topOfLongest[x] };
}

function paintRun(start, stop, owner, width, height, number) {
  let x = Math.floor(start / height);
  let y = start - x * height;
  for (let left = stop - start; left > 0; x++, y = 0) {
    const end = Math.min(height, y + left);
    for (let row = y, at = y * width + x; row < end; row++, at += width) owner[at] = number;
    if (end - y > longest[x]) {
      longest[x] = end - y;
      topOfLongest[x] = y;
    }
    left -= end - y;
  }
}

/**
 * Colour what is painted.
 *
 * @param {Uint32Array} pixels - of the picture
 * @param {Uint16Array} owner - number of each pixel, 0 where there is none
 * @param {{fill: Uint32Array, edge: Uint32Array}} palette - by number
 * @param {number} thickness - of the line along the inner edge, in pixels
 * @param {{owner: Uint16Array, color: number} | null} other - what differs from it has this colour
 * @returns {Uint32Array} how many pixels of each number are seen
 */
function colorPixels(pixels, owner, width, height, palette, thickness, other) {
  const { fill, edge } = palette;
  const seen = new Uint32Array(fill.length);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at++) {
      const number = owner[at];
      seen[number]++;
      if (other !== null && other.owner[at] !== number) pixels[at] = other.color;
      else if (number === 0) pixels[at] = 0;
      else pixels[at] = isEdge(owner, at, x, y, width, height, number, thickness) ? edge[number] : fill[number];
    }
  }
  return seen;
}

function isEdge(owner, at, x, y, width, height, number, thickness) {
  for (let step = 1; step <= thickness; step++) {
    if (x >= step && owner[at - step] !== number) return true;
    if (x + step < width && owner[at + step] !== number) return true;
    if (y >= step && owner[at - step * width] !== number) return true;
    if (y + step < height && owner[at + step * width] !== number) return true;
  }
  return false;
}

/** A colour as the four bytes of a pixel. */
function pixelOf([red, green, blue], alpha) {
  return ((Math.round(alpha * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** The colour of the line around a mask, as in the overlay. */
function lighter(color) {
  return color.map((channel) => Math.floor(channel * 0.7 + 255 * 0.3));
}

/** Black or white, whichever reads better on a colour, as in the overlay. */
function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 120 ? "rgb(16 16 16)" : "rgb(255 255 255)";
}
