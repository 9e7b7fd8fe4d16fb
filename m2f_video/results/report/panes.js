// The picture, or two of them: masks and names over the video.

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
