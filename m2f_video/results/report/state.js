// What the page is about, what of it is shown, and how. Texts from the data become text nodes only.

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
