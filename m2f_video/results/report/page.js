// The page: its state, the video, the rows of tracks and the controls. Texts from the data become text nodes only.

const about = JSON.parse(dataOf("about"));
const { width: WIDTH, height: HEIGHT, rows: ROWS } = about;
const COUNT = about.frames.length;
const RATE = about.rate[0] / about.rate[1];
const PANES = about.results.length;
const SIDES = ["A", "B"];
const DIFFERENT = [255, 45, 149];
const MARKED = 0.65; // opacity of what differs
const NAMED_FROM = 0.1; // share of a mask that others leave, from which it has a name
const PARTS_FROM = 0.1; // share of pixels from which results are said to part
const SPEEDS = [0.1, 0.25, 0.5, 1, 1.5, 2, 4];
const THICKNESS = Math.min(3, Math.max(1, Math.round(Math.min(WIDTH, HEIGHT) / 360))); // as in the overlay

const $ = (id) => document.getElementById(id);
const clamp = (value, least, most) => Math.min(most, Math.max(least, value));
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

const state = {
  frame: 0, // that is asked for
  shown: -1, // that the picture shows
  hidden: new Set(), // rows that were switched off
  solo: null, // the only row
  classes: new Set(), // that are shown; none means all
  minScore: about.minScore,
  opacity: 0.45,
  contours: false,
  names: true,
  differences: PANES === 2,
  hot: null, // the row under the pointer or the focus
  pinned: null, // the row that was chosen
};

let stores = [];
let areas = [];
let shared = [];
let panes = [];
let rowViews = [];
let lanes = null;

// --- which rows are shown

const labelsOf = (row) => [...new Set(row.tracks.filter(Boolean).map((track) => track.label))];
const labelOf = (row) => labelsOf(row).join(" \u2192 ");
/** Numbers of tracks: of two results each with its letter, since they are numbered apart. */
const numberOf = (row) =>
  PANES === 1 ? String(row.tracks[0].id) : row.tracks.map((track, side) => track && SIDES[side] + track.id).filter(Boolean).join(" ");
const nameOf = (row) => `${labelOf(row)} ${numberOf(row)}`;
const certaintyOf = (row) => Math.max(...row.tracks.filter(Boolean).map((track) => track.certainty));

function isListed(row) {
  const inClass = state.classes.size === 0 || labelsOf(row).some((label) => state.classes.has(label));
  return inClass && certaintyOf(row) >= state.minScore;
}

function isShown(index) {
  if (!isListed(ROWS[index])) return false;
  return state.solo === null ? !state.hidden.has(index) : state.solo === index;
}

/** Rows of a pane, the one on top first. */
function shownIn(side) {
  return ROWS.map((row, index) => ({ row, index, track: row.tracks[side] }))
    .filter(({ track, index }) => track && track.certainty >= state.minScore && isShown(index))
    .sort((a, b) => b.track.score - a.track.score || a.index - b.index);
}

/** In each frame, the share of pixels of shown tracks that only one of the results has. */
function disagreement() {
  const either = new Float64Array(COUNT);
  const both = new Float64Array(COUNT);
  const done = new Set();
  ROWS.forEach((row, index) => {
    const keys = row.tracks.map((track) => track?.key ?? "");
    if (!isShown(index) || done.has(keys.join())) return;
    done.add(keys.join());
    const common = row.shared === undefined ? null : shared[row.shared];
    for (let frame = 0; frame < COUNT; frame++) {
      const inBoth = common ? common[frame] : 0;
      both[frame] += inBoth;
      row.tracks.forEach((track, side) => (either[frame] += track ? areas[side][track.key][frame] : 0));
      either[frame] -= inBoth;
    }
  });
  return either.map((pixels, frame) => (pixels ? 1 - both[frame] / pixels : 0));
}

// --- panes

class Pane {
  constructor(side) {
    this.side = side;
    const root = $("pane-template").content.cloneNode(true);
    this.figure = root.querySelector(".pane");
    this.picture = root.querySelector(".picture");
    this.canvas = root.querySelector(".masks");
    this.tags = root.querySelector(".tags");
    this.tip = root.querySelector(".tip");
    Object.assign(this.canvas, { width: WIDTH, height: HEIGHT });
    this.context = this.canvas.getContext("2d");
    this.image = this.context.createImageData(WIDTH, HEIGHT);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.owner = new Uint16Array(WIDTH * HEIGHT);
    this.seen = []; // rows in the frame, the one on top first
    this.tagOf = new Map();
    if (PANES === 2) {
      const caption = this.figure.querySelector("figcaption");
      caption.hidden = false;
      const letter = document.createElement("b");
      letter.textContent = SIDES[side];
      caption.append(letter, about.results[side].name);
    }
    this.base = side === 0 ? video : document.createElement("canvas");
    if (side) Object.assign(this.base, { width: WIDTH, height: HEIGHT });
    this.base.classList.add("base");
    this.picture.prepend(this.base);
    this.#listen();
    $("stage").append(root);
  }

  /** Paint the masks of a frame. */
  compose(counts) {
    this.owner.fill(0);
    const rows = shownIn(this.side);
    const keys = new Set(); // of tracks that share their masks, one has a name
    this.seen = [];
    for (const { index, track } of rows.slice().reverse()) {
      if (counts[track.key]) {
        const place = paintMask(counts[track.key], this.owner, WIDTH, HEIGHT, index + 1);
        this.seen.unshift({ index, track, place });
      }
    }
    this.seen = this.seen.filter(({ track }) => !keys.has(track.key) && keys.add(track.key));
    if (this.side && isVideoThere) this.base.getContext("2d").drawImage(video, 0, 0, WIDTH, HEIGHT, 0, 0, WIDTH, HEIGHT);
  }

  color() {
    const other = state.differences ? panes[1 - this.side] : undefined;
    const mark = other ? { owner: other.owner, color: pixelOf(DIFFERENT, MARKED) } : null;
    this.left = colorPixels(this.pixels, this.owner, WIDTH, HEIGHT, palette(), THICKNESS, mark);
    this.context.putImageData(this.image, 0, 0);
    const names = this.seen.map(({ index }) => nameOf(ROWS[index]));
    this.canvas.setAttribute("aria-label", names.length ? `Masks of ${names.join(", ")}` : "No masks in this frame");
    this.#placeTags();
  }

  /** Size on the screen, in CSS pixels. */
  fit(width, height) {
    this.picture.style.width = `${width}px`;
    this.picture.style.height = `${height}px`;
    this.figure.style.width = `${width}px`;
    this.canvas.classList.toggle("large", width >= WIDTH);
    if (this.base === video) {
      // A video has even sides; the column or row that was added lies outside.
      video.style.width = `${(100 * (WIDTH + (WIDTH % 2))) / WIDTH}%`;
      video.style.height = `${(100 * (HEIGHT + (HEIGHT % 2))) / HEIGHT}%`;
    }
    this.#placeTags();
  }

  #placeTags() {
    const used = new Set();
    const taken = [];
    const { clientWidth: width, clientHeight: height } = this.picture;
    for (const { index, track, place } of state.names ? this.seen : []) {
      const area = areas[this.side][track.key][state.shown];
      if (this.left[index + 1] < NAMED_FROM * area && hotRow() !== index) continue;
      const tag = this.#tag(index, track);
      used.add(tag);
      tag.hidden = false;
      tag.classList.toggle("faint", hotRow() !== null && hotRow() !== index);
      const size = { width: tag.offsetWidth, height: tag.offsetHeight };
      const left = clamp(((place.x + 0.5) / WIDTH) * width - size.width / 2, 2, Math.max(2, width - size.width - 2));
      const above = (place.y / HEIGHT) * height - size.height - 3;
      let top = above >= 2 ? above : (place.y / HEIGHT) * height + 3;
      const covers = (other) =>
        left < other.right && other.left < left + size.width && top < other.bottom && other.top < top + size.height;
      for (let other; (other = taken.find(covers)) && other.bottom + size.height < height; ) top = other.bottom + 1;
      taken.push({ left, top, right: left + size.width, bottom: top + size.height });
      tag.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
    }
    for (const tag of this.tagOf.values()) if (!used.has(tag)) tag.hidden = true;
  }

  #tag(index, track) {
    let tag = this.tagOf.get(index);
    if (!tag) {
      tag = document.createElement("span");
      tag.textContent = `${track.label} ${track.id}`;
      tag.style.background = `rgb(${ROWS[index].color.join(" ")})`;
      tag.style.color = inkOn(ROWS[index].color);
      this.tagOf.set(index, tag);
      this.tags.append(tag);
    }
    return tag;
  }

  /** The row at a place on the screen; null where there is none. */
  rowAt(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - bounds.left) / bounds.width) * WIDTH);
    const y = Math.floor(((event.clientY - bounds.top) / bounds.height) * HEIGHT);
    if (x < 0 || y < 0 || x >= WIDTH || y >= HEIGHT) return null;
    const number = this.owner[y * WIDTH + x];
    return number ? number - 1 : null;
  }

  point(event) {
    const index = this.rowAt(event);
    setHot(index);
    this.tip.hidden = index === null;
    if (index === null) return;
    const track = ROWS[index].tracks[this.side];
    const area = areas[this.side][track.key][Math.max(0, state.shown)];
    this.tip.textContent = `${track.label} ${track.id} \u00b7 ${track.certainty.toFixed(2)} \u00b7 ${area.toLocaleString("en")} px`;
    const bounds = this.picture.getBoundingClientRect();
    const left = clamp(event.clientX - bounds.left + 14, 4, Math.max(4, bounds.width - this.tip.offsetWidth - 4));
    const top = clamp(event.clientY - bounds.top + 18, 4, Math.max(4, bounds.height - this.tip.offsetHeight - 4));
    this.tip.style.transform = `translate(${left}px, ${top}px)`;
  }

  #listen() {
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
      setHot(null);
    });
    this.picture.addEventListener("click", (event) => {
      const index = this.rowAt(event);
      pin(index === state.pinned ? null : index);
      if (index !== null) rowViews[index].item.scrollIntoView({ block: "nearest" });
    });
  }
}

function hotRow() {
  const row = state.hot ?? state.pinned;
  return row !== null && isShown(row) ? row : null;
}

function palette() {
  const fill = new Uint32Array(ROWS.length + 1);
  const edge = new Uint32Array(ROWS.length + 1);
  const hot = hotRow();
  ROWS.forEach(({ color }, index) => {
    const opacity = state.contours ? 0 : state.opacity;
    const isHot = hot === index;
    const alpha = hot === null ? opacity : isHot ? Math.min(1, Math.max(opacity, 0.3) + 0.2) : opacity * 0.4;
    fill[index + 1] = pixelOf(color, alpha);
    edge[index + 1] = isHot ? pixelOf([255, 255, 255], 1) : pixelOf(lighter(color), hot === null ? 1 : 0.55);
  });
  return { fill, edge };
}

/** Paint and colour the frame that is shown, now or when its masks are inflated. */
async function paint() {
  const frame = state.shown;
  let counts = stores.map((store) => store.at(frame));
  while (counts.includes(null)) {
    await Promise.all(stores.map((store) => store.load(frame)));
    if (frame !== state.shown) return;
    counts = stores.map((store) => store.at(frame));
  }
  panes.forEach((pane, side) => pane.compose(counts[side]));
  recolor();
  tellFrame();
  document.documentElement.dataset.painted = frame;
}

function recolor() {
  for (const pane of panes) pane.color();
}

function fitPanes() {
  const stage = $("stage");
  const isStacked = getComputedStyle(stage).flexDirection === "column";
  const across = isStacked ? 1 : PANES;
  const caption = PANES === 2 ? 26 : 0;
  const most = isStacked ? window.innerHeight * (PANES === 2 ? 0.3 : 0.5) : stage.clientHeight - caption;
  const scale = Math.max(0.05, Math.min((stage.clientWidth - 12 * (across - 1)) / across / WIDTH, most / HEIGHT));
  for (const pane of panes) pane.fit(Math.floor(WIDTH * scale), Math.floor(HEIGHT * scale));
}

// --- video

const video = document.createElement("video");
let isVideoThere = false;
let wanted = null; // a frame to go to when the video has arrived at another one
let isPlaying = false; // that it was asked to
let isLooping = true;

function openVideo() {
  Object.assign(video, { muted: true, playsInline: true, preload: "auto", tabIndex: -1 });
  video.setAttribute("aria-label", "The video");
  video.addEventListener("loadeddata", () => {
    isVideoThere = true;
    $("play").disabled = false;
    video.currentTime = timeOf(state.frame);
  });
  video.addEventListener("error", () => {
    isVideoThere = false;
    $("play").disabled = true;
    say(about.link === null ? "This browser does not play the video (H.264); masks are drawn on black."
      : `The video ${decodeURIComponent(about.link)} is not beside this page, or this browser does not play it (H.264); masks are drawn on black.`);
    show(state.frame);
  });
  video.addEventListener("seeked", () => {
    if (wanted !== null && wanted !== frameAt(video.currentTime)) video.currentTime = timeOf(wanted);
    else if (video.paused) show(frameAt(video.currentTime));
    if (wanted === state.shown) wanted = null;
  });
  for (const event of ["play", "pause"]) video.addEventListener(event, tellPlaying);
  // Not by the video's own `loop`, with which Chromium goes to the start also where somebody steps to the last frame.
  video.addEventListener("ended", () => {
    if (!isPlaying || !isLooping) return;
    video.currentTime = 0;
    play();
  });
  video.src = about.link ?? URL.createObjectURL(new Blob([bytesOf(dataOf("video-data"))], { type: "video/mp4" }));
  followVideo();
}

/** A frame is shown from its number over the rate on; its middle is hit however a browser rounds. */
const timeOf = (frame) => (frame + 0.5) / RATE;
const frameAt = (time) => clamp(Math.floor(time * RATE + 1e-6), 0, COUNT - 1);

function followVideo() {
  if ("requestVideoFrameCallback" in video) {
    const next = (_, { mediaTime }) => {
      if (!video.paused) follow(clamp(Math.round(mediaTime * RATE), 0, COUNT - 1));
      video.requestVideoFrameCallback(next);
    };
    video.requestVideoFrameCallback(next);
  } else {
    const next = () => {
      if (!video.paused && !video.seeking) follow(frameAt(video.currentTime));
      requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
  }
}

function follow(frame) {
  state.frame = frame;
  show(frame);
}

function show(frame) {
  state.shown = frame;
  placeHead();
  paint();
}

/** Go to a frame, counted from 0 in the result. */
function seek(frame) {
  state.frame = clamp(Math.round(frame), 0, COUNT - 1);
  placeHead();
  if (!isVideoThere) {
    show(state.frame);
  } else if (state.frame === state.shown && !video.seeking) {
    wanted = null;
  } else if (video.seeking) {
    wanted = state.frame;
  } else {
    wanted = null;
    video.currentTime = timeOf(state.frame);
  }
}

function step(by) {
  pause();
  seek(state.frame + by);
}

function play() {
  isPlaying = true;
  video.play().catch((error) => isPlaying && say(`The video cannot be played: ${error.message}`));
}

function pause() {
  isPlaying = false;
  video.pause();
}

function togglePlay() {
  if (isVideoThere) (isPlaying && !video.ended ? pause : play)();
}

function tellPlaying() {
  $("play-icon").setAttribute("href", video.paused ? "#i-play" : "#i-pause");
  $("play").setAttribute("aria-label", video.paused ? "Play" : "Pause");
  // Where it stopped may be a frame after the one on the screen: going there brings both together.
  if (video.paused && isVideoThere && !video.seeking) seek(frameAt(video.currentTime));
}

function setSpeed(speed) {
  video.playbackRate = video.defaultPlaybackRate = speed;
  $("speed").value = String(speed);
}

function changeSpeed(by) {
  const at = SPEEDS.indexOf(video.playbackRate);
  setSpeed(SPEEDS[clamp(at + by, 0, SPEEDS.length - 1)]);
}

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
}

// --- where it is

function placeHead() {
  const frame = state.frame;
  const head = $("playhead");
  head.style.left = `${(100 * frame) / COUNT}%`;
  head.style.width = `${100 / COUNT}%`;
  const number = about.frames[frame];
  if (document.activeElement !== $("frame")) $("frame").value = number;
  $("ruler").setAttribute("aria-valuenow", number);
  $("ruler").setAttribute("aria-valuetext", `frame ${number}, ${frame + 1} of ${COUNT}`);
  $("time").textContent = clock(number / about.fps);
}

function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  const rest = (seconds - 60 * minutes).toFixed(2).padStart(5, "0");
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

/** Say what is in the frame, to the rows and, where it stands still, to screen readers. */
function tellFrame() {
  const frame = state.shown;
  ROWS.forEach((row, index) => {
    const isThere = row.tracks.some((track, side) => track && areas[side][track.key][frame] > 0);
    rowViews[index].item.classList.toggle("absent", !isThere);
  });
  if (PANES === 2) $("disagreement-now").textContent = percent(parted[frame]);
  if (!video.paused) return;
  const names = panes[0].seen.map(({ index }) => nameOf(ROWS[index]));
  $("status").textContent = `Frame ${about.frames[frame]}: ${names.length ? names.join(", ") : "no track"}`;
}

/** The next frame, in a direction, in which a track comes or goes or the results begin to part. */
function jump(by) {
  const signs = Array.from({ length: COUNT }, () => "");
  ROWS.forEach((row, index) => {
    if (!isShown(index)) return;
    row.tracks.forEach((track, side) => {
      if (track) areas[side][track.key].forEach((area, frame) => (signs[frame] += area ? "1" : "0"));
    });
  });
  if (PANES === 2) parted.forEach((share, frame) => (signs[frame] += share >= PARTS_FROM ? "1" : "0"));
  let frame = state.frame + by;
  while (frame > 0 && frame < COUNT && signs[frame] === signs[frame - 1]) frame += by;
  step(clamp(frame, 0, COUNT - 1) - state.frame);
}

// --- rows

let parted = new Float64Array(COUNT);

function makeRow(row, index) {
  const root = $("row-template").content.cloneNode(true);
  const find = (selector) => root.querySelector(selector);
  const view = { item: find(".row"), eye: find(".eye"), solo: find(".solo"), name: find(".name"), lane: find(".lane") };
  find(".swatch").style.background = `rgb(${row.color.join(" ")})`;
  find(".label").textContent = labelOf(row);
  find(".number").textContent = numberOf(row);
  find(".note").textContent = noteOf(row, index);
  find(".numbers").append(...numbersOfRow(row));
  const all = (text) => row.tracks.filter(Boolean).map(text).join(" and ");
  view.name.title = `${nameOf(row)}: certainty ${all((track) => track.certainty.toFixed(3))}, score ${all((track) => track.score.toFixed(3))}`;
  view.name.setAttribute("aria-label", `Highlight ${nameOf(row)}`);
  view.solo.setAttribute("aria-label", `Only ${nameOf(row)}`);
  view.solo.title = "Only this one";
  view.lane.setAttribute("aria-label", `${nameOf(row)} is in ${all((track) => track.seen)} of ${COUNT} frames`);
  view.lane.dataset.row = index;
  view.eye.addEventListener("click", () => toggle(index));
  view.solo.addEventListener("click", () => solo(index));
  view.name.addEventListener("click", () => pin(state.pinned === index ? null : index));
  for (const event of ["pointerenter", "focusin"]) view.item.addEventListener(event, () => setHot(index));
  for (const event of ["pointerleave", "focusout"]) view.item.addEventListener(event, () => setHot(null));
  $("rows").append(root);
  return view;
}

function spanOf(text, name = "") {
  return Object.assign(document.createElement("span"), { textContent: text, className: name });
}

function noteOf(row, index) {
  if (PANES === 2 && row.tracks.includes(null)) return row.tracks[1] ? "only B" : "only A";
  const same = ROWS.findIndex((other) => PANES === 1 && other.tracks[0].key === row.tracks[0].key);
  return same >= 0 && same < index ? `masks of ${ROWS[same].tracks[0].id}` : "";
}

function numbersOfRow(row) {
  const texts = row.tracks.map((track) => track?.certainty.toFixed(2) ?? "\u2013");
  if (PANES === 2) return [...texts, row.iou?.toFixed(2) ?? "\u2013"].map((text) => spanOf(text));
  const [track] = row.tracks;
  const meter = spanOf("", "meter");
  meter.append(spanOf(""));
  meter.firstChild.style.width = `${100 * clamp(track.certainty, 0, 1)}%`;
  return [spanOf(`${track.seen}`, "muted"), meter, spanOf(texts[0])];
}

function drawLane(lane) {
  const sharp = sharpCanvas(lane);
  if (!sharp) return;
  if (lane.dataset.row === undefined) {
    drawBars(sharp, parted, 1, DIFFERENT, { top: 0, height: 1 }, 0.14);
    return;
  }
  const row = ROWS[lane.dataset.row];
  row.tracks.forEach((track, side) => {
    if (!track) return;
    const values = areas[side][track.key];
    const most = values.reduce((a, b) => Math.max(a, b), 1);
    const place = PANES === 2 ? { top: side * 0.53, height: 0.47 } : { top: 0, height: 1 };
    drawBars(sharp, values, most, row.color, place, 0.22 + 0.2 * track.certainty);
  });
}

function toggle(index) {
  if (state.solo !== null) {
    // What is seen is what the switch starts from: all but the only one are off.
    state.hidden = new Set(ROWS.keys());
    state.hidden.delete(state.solo);
    state.solo = null;
  }
  if (!state.hidden.delete(index)) state.hidden.add(index);
  update();
}

function solo(index) {
  state.solo = state.solo === index ? null : index;
  update();
}

function showAll() {
  state.hidden.clear();
  state.classes.clear();
  state.solo = null;
  state.minScore = 0;
  update();
}

function setHot(index) {
  if (state.hot === index) return;
  state.hot = index;
  tellHot();
}

function pin(index) {
  state.pinned = index;
  tellHot();
}

function tellHot() {
  rowViews.forEach((view, index) => {
    view.item.classList.toggle("hot", hotRow() === index);
    view.name.setAttribute("aria-pressed", String(state.pinned === index));
  });
  if (panes.length && state.shown >= 0) recolor();
}

/** After a change of what is shown: rows, numbers, lanes, masks. */
function update() {
  const listed = ROWS.filter(isListed).length;
  ROWS.forEach((row, index) => {
    const { item, eye, solo: button } = rowViews[index];
    const isOn = isShown(index);
    item.hidden = !isListed(row);
    item.classList.toggle("off", !isOn);
    eye.setAttribute("aria-pressed", String(isOn));
    eye.setAttribute("aria-label", `Show ${nameOf(row)}`);
    eye.title = isOn ? "Hide" : "Show";
    button.setAttribute("aria-pressed", String(state.solo === index));
  });
  for (const chip of $("classes").children) {
    chip.setAttribute("aria-pressed", String(state.classes.has(chip.dataset.label)));
  }
  $("min-score").value = state.minScore;
  $("min-score-value").value = state.minScore.toFixed(2);
  const shown = ROWS.filter((_, index) => isShown(index)).length;
  $("tally").textContent = `${shown} of ${ROWS.length} shown`;
  $("reset").hidden = shown === ROWS.length;
  $("empty").hidden = listed > 0;
  $("empty").textContent = ROWS.length
    ? `None of the ${ROWS.length} tracks passes the filters.`
    : "There are no tracks: nothing was found, or nothing as certain as was asked for.";
  if (PANES === 2) parted = disagreement();
  lanes.redraw();
  tellHot();
  if (state.shown >= 0) paint();
}

// --- controls

function makeClasses() {
  const counts = new Map();
  for (const row of ROWS) for (const label of labelsOf(row)) counts.set(label, (counts.get(label) ?? 0) + 1);
  for (const [label, count] of [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0]))) {
    const chip = document.createElement("button");
    Object.assign(chip, { type: "button", className: "chip" });
    chip.append(label, spanOf(count));
    chip.dataset.label = label;
    chip.addEventListener("click", () => {
      if (!state.classes.delete(label)) state.classes.add(label);
      update();
    });
    $("classes").append(chip);
  }
  $("classes").closest("fieldset").hidden = counts.size === 0;
}

function makeFacts() {
  document.title = `${about.title} \u2013 m2f-video`;
  $("title").textContent = about.title;
  $("title").title = about.source;
  const frames = COUNT === 1 ? "1 frame" : `${COUNT.toLocaleString("en")} frames`;
  const tracks = PANES === 2 ? "two results" : ROWS.length === 1 ? "1 track" : `${ROWS.length} tracks`;
  const facts = [`${WIDTH} \u00d7 ${HEIGHT}`, frames, `${Number(about.fps.toFixed(3))} fps`, tracks];
  $("facts").append(...facts.map((fact) => spanOf(fact)));
  $("of").textContent = `of ${about.frames.at(-1)}`;
  $("columns").append(...(PANES === 2 ? ["A", "B", "IoU"] : ["Frames", "Certainty"]).map((text) => spanOf(text)));
  const keys = [...new Set(about.results.flatMap(({ made }) => made.map(([key]) => key)))];
  $("made").hidden = keys.length === 0;
  for (const key of keys) {
    const line = $("made-table").insertRow();
    line.append(Object.assign(document.createElement("th"), { scope: "row", textContent: key.replaceAll("_", " ") }));
    const values = about.results.map(({ made }) => made.find(([other]) => other === key)?.[1] ?? "\u2013");
    for (const value of values) line.insertCell().textContent = value;
    line.classList.toggle("differs", new Set(values).size > 1);
  }
}

function switchTheme() {
  const themes = ["auto", "light", "dark"];
  const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
  document.documentElement.dataset.theme = next;
  $("theme-name").textContent = next[0].toUpperCase() + next.slice(1);
}

function listenToControls() {
  $("play").addEventListener("click", togglePlay);
  $("back").addEventListener("click", () => step(-1));
  $("forward").addEventListener("click", () => step(1));
  $("speed").addEventListener("change", () => setSpeed(Number($("speed").value)));
  $("loop").addEventListener("click", () => {
    isLooping = !isLooping;
    $("loop").setAttribute("aria-pressed", String(isLooping));
  });
  $("frame").min = about.frames[0];
  $("frame").max = about.frames.at(-1);
  $("frame").addEventListener("change", () => {
    const number = Number($("frame").value);
    const at = about.frames.findIndex((frame) => frame >= number);
    pause();
    seek(at < 0 ? COUNT - 1 : at);
    $("frame").value = about.frames[state.frame];
  });
  $("min-score").addEventListener("input", () => {
    state.minScore = Number($("min-score").value);
    update();
  });
  $("reset").addEventListener("click", showAll);
  $("opacity").addEventListener("input", () => {
    state.opacity = Number($("opacity").value);
    $("opacity-value").value = percent(state.opacity);
    recolor();
  });
  $("opacity-value").value = percent(state.opacity);
  for (const name of ["contours", "names", "differences"]) {
    $(name).addEventListener("change", () => {
      state[name] = $(name).checked;
      recolor();
    });
  }
  $("theme").addEventListener("click", switchTheme);
  $("help").addEventListener("click", () => $("keys").showModal());
}

/** The frame at a place on the screen. */
function frameUnder(event) {
  const { left, width } = $("ruler").getBoundingClientRect();
  return clamp(Math.floor(((event.clientX - left) / width) * COUNT), 0, COUNT - 1);
}

function listenToTimeline() {
  const timeline = $("timeline");
  const isTime = (event) => event.target instanceof Element && event.target.closest(".lane, .ruler") !== null;
  let dragging = null;
  // A finger that goes up or down scrolls, and one that taps seeks; of what has no listener of its own it would be taken
  // to mean the button nearby.
  const tap = (event) => {
    pause();
    seek(frameUnder(event));
  };
  for (const target of timeline.querySelectorAll(".lane, .ruler")) target.addEventListener("click", tap);
  timeline.addEventListener("pointerdown", (event) => {
    const isScroll = event.pointerType === "touch" && event.target.closest(".ruler") === null;
    if (!isTime(event) || event.button !== 0 || isScroll) return;
    dragging = event.pointerId;
    timeline.setPointerCapture(event.pointerId);
    pause();
    seek(frameUnder(event));
    $("ruler").focus({ preventScroll: true, focusVisible: false });
    event.preventDefault();
  });
  timeline.addEventListener("pointermove", (event) => {
    if (dragging === event.pointerId) seek(frameUnder(event));
    const isHere = isTime(event) || dragging === event.pointerId;
    $("hint").hidden = !isHere;
    if (!isHere) return;
    const frame = frameUnder(event);
    $("hint").textContent = about.frames[frame];
    $("hint").style.left = `${(100 * (frame + 0.5)) / COUNT}%`;
  });
  for (const name of ["pointerup", "pointercancel"]) timeline.addEventListener(name, () => (dragging = null));
  timeline.addEventListener("pointerleave", () => ($("hint").hidden = true));
}

const KEYS = {
  " ": togglePlay,
  ArrowLeft: (event) => step(event.shiftKey ? -10 : -1),
  ArrowRight: (event) => step(event.shiftKey ? 10 : 1),
  Home: () => step(-COUNT),
  End: () => step(COUNT),
  "[": () => jump(-1),
  "]": () => jump(1),
  "-": () => changeSpeed(-1),
  "+": () => changeSpeed(1),
  "=": () => changeSpeed(1),
  a: showAll,
  c: () => $("contours").click(),
  n: () => $("names").click(),
  d: () => $("differences").click(),
  t: switchTheme,
  "?": () => $("keys").showModal(),
};

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    // Fields, sliders and lists take keys of their own, buttons the space bar.
    if (target.matches("input:not([type=checkbox]), select") || (event.key === " " && target.matches("button, input, summary"))) return;
    const digit = /^Digit([1-9])$/.exec(event.code);
    const listed = [...ROWS.keys()].filter((index) => isListed(ROWS[index]));
    const action = digit
      ? () => {
          const index = listed[digit[1] - 1];
          if (index !== undefined) (event.shiftKey ? solo : toggle)(index);
        }
      : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || (event.key === "d" && PANES === 1)) return;
    event.preventDefault();
    action(event);
  });
}

// --- start

async function start() {
  stores = about.results.map(({ keys }, side) => new MaskStore(side, keys, about.chunk, COUNT));
  areas = await Promise.all(about.results.map((_, side) => numbersOf(`areas-${side}`, COUNT)));
  if (PANES === 2) shared = await numbersOf("shared", COUNT);
  document.documentElement.classList.toggle("compare", PANES === 2);
  makeFacts();
  makeClasses();
  panes = about.results.map((_, side) => new Pane(side));
  rowViews = ROWS.map(makeRow);
  lanes = new Lanes(drawLane);
  for (const view of rowViews) lanes.add(view.lane);
  if (PANES === 2) {
    $("disagreement").hidden = $("differences-label").hidden = false;
    lanes.add($("disagreement").querySelector(".lane"));
  } else {
    $("keys-differences").hidden = true;
  }
  $("ruler").setAttribute("aria-valuemin", about.frames[0]);
  $("ruler").setAttribute("aria-valuemax", about.frames.at(-1));
  if (window.matchMedia("(max-width: 760px)").matches) $("panel").open = false;
  listenToControls();
  listenToTimeline();
  listenToKeys();
  new ResizeObserver(() => {
    fitPanes();
    lanes.redraw();
    drawRuler($("ruler"), about.frames, $("ruler").clientWidth);
  }).observe(document.body);
  new ResizeObserver(fitPanes).observe($("stage"));
  $("play").disabled = true;
  update();
  placeHead();
  openVideo();
}

start().catch((error) => say(`This page could not be drawn: ${error.message}`));
