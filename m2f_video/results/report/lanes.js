// The timeline: lanes that show when a track is there and how large, a ruler, and the frame under the pointer.

/** A canvas in step with its size on the screen; null where it has none. */
function sharpCanvas(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round(canvas.clientHeight * scale);
  if (!width || !height) return null;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  return { context, width, height, scale };
}

/**
 * Draw bars, one for each frame or each column of the screen, whichever are fewer: a band where there is something, and
 * in it how much of it.
 *
 * @param {ArrayLike<number>} values - one a frame
 * @param {number} most - what fills the band
 * @param {number[]} color - of the bars
 * @param {{top: number, height: number}} place - shares of the canvas
 * @param {number} band - opacity of the band
 */
function drawBars(sharp, values, most, color, place, band) {
  const { context, width, height, scale } = sharp;
  const count = values.length;
  const bars = Math.min(count, width);
  const top = place.top * height;
  const full = place.height * height;
  const gap = width / bars >= 12 * scale ? scale : 0;
  context.fillStyle = `rgb(${color.join(" ")})`;
  for (let bar = 0; bar < bars; bar++) {
    const first = Math.floor((bar * count) / bars);
    const last = Math.max(first + 1, Math.floor(((bar + 1) * count) / bars));
    let value = 0;
    for (let frame = first; frame < last; frame++) value = Math.max(value, values[frame]);
    if (!value) continue;
    const x = Math.round((bar * width) / bars);
    const size = Math.max(1, Math.round(((bar + 1) * width) / bars) - x - gap); // whole pixels: no seams
    const filled = Math.max(full * 0.14, (full * value) / most);
    context.globalAlpha = band;
    context.fillRect(x, top, size, full);
    context.globalAlpha = 1;
    context.fillRect(x, top + full - filled, size, filled);
  }
}

/** A step between the labels of a ruler: 1, 2 or 5 times a power of ten, at most `most` of them. */
function labelStep(count, most) {
  let step = 1;
  for (let index = 0; count / step > most; index++) step *= [2, 2.5, 2][index % 3];
  return step;
}

/** Put the numbers of frames on a ruler. */
function drawRuler(ruler, numbers, width) {
  for (const old of ruler.querySelectorAll(".tick")) old.remove();
  const step = labelStep(numbers.length, Math.max(2, width / 64));
  for (let frame = 0; frame < numbers.length; frame += step) {
    const tick = document.createElement("span");
    tick.className = "tick";
    tick.textContent = numbers[frame];
    tick.style.left = `${(100 * frame) / numbers.length}%`;
    if (frame + step * 0.4 > numbers.length && frame) tick.classList.add("last");
    ruler.append(tick);
  }
}

/** Draw lanes when they come into sight, and again when that is asked for. */
class Lanes {
  constructor(draw) {
    this.draw = draw;
    this.seen = new Set();
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) this.seen.delete(entry.target);
        else if (!this.seen.has(entry.target)) {
          this.seen.add(entry.target);
          this.draw(entry.target);
        }
      }
    });
  }

  add(lane) {
    this.observer.observe(lane);
  }

  redraw() {
    for (const lane of this.seen) this.draw(lane);
  }
}
