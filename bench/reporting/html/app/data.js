// Embedded data of the page: the index is read at once, details and samples on demand.

const { h, render, Fragment } = preact;
const { useState, useEffect, useMemo, useRef, useCallback } = preactHooks;
const html = htm.bind(h);

const INDEX = JSON.parse(document.getElementById("index").textContent);
INDEX.runs.forEach((run) => {
  run.where = INDEX.settings[run.setting];
  run.score = run.values[0] ? run.values[0][0] : null;
});
const RUNS = new Map(INDEX.runs.map((run) => [run.id, run]));

const unpacking = new Map();

// Unpack a chunk (gzip in base64). The promise is cached, so that a chunk is unpacked only once.
function unpack(element) {
  if (!unpacking.has(element)) {
    const packed = atob(document.getElementById(element).textContent);
    const bytes = Uint8Array.from(packed, (sign) => sign.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacking.set(element, new Response(plain).json());
  }
  return unpacking.get(element);
}

async function detailsOf(run) {
  const records = await unpack(`details-${run.chunk}`);
  return records.find((record) => record.id === run.id);
}

// What is embedded of a run's samples, packed outcomes included; null when there is nothing.
async function heldOf(run) {
  if (!run || run.samples === null) return null;
  return (await unpack(`samples-${run.samples}`)).runs[run.id];
}

// The embedded samples of a run, with their texts in place; null when it has none.
async function samplesOf(run) {
  if (!run || run.samples === null) return null;
  const { texts, runs, images, no_images: noImages } = await unpack(`samples-${run.samples}`);
  const { total, samples } = runs[run.id];
  const text = (place) => (place === null ? null : texts[place]);
  const whole = (sample) => ({
    ...sample,
    prompt: text(sample.prompt),
    choices: sample.choices.map(text),
    images: sample.images.map((place) => images[place]),
  });
  return { total, noImages, samples: samples.map(whole) };
}

// The result of an asynchronous call, undefined until it arrives. A result that arrives after
// the inputs have changed is dropped: it belongs to a run that is no longer shown.
function useLater(start, inputs) {
  const [value, setValue] = useState(undefined);
  useEffect(() => {
    let wanted = true;
    setValue(undefined);
    start().then((found) => wanted && setValue(found));
    return () => {
      wanted = false;
    };
  }, inputs);
  return value;
}
