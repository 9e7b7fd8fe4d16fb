// The video: frames that are gone to exactly, and followed while it plays.

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
