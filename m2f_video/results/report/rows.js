// A row for each track or pair of tracks: switches, numbers, and a lane of the timeline.

let parted = new Float64Array(COUNT);

function makeRow(row, index) {
  const root = $("row-template").content.cloneNode(true);
  const find = (selector) => root.querySelector(selector);
  const view = { item: find(".row"), eye: find(".eye"), solo: find(".solo"), name: find(".name"), lane: find(".lane") };
  find(".swatch").style.setProperty("--color", `rgb(${row.color.join(" ")})`);
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
