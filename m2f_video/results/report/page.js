// The controls, the timeline, the keys, and the start of it all.

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
