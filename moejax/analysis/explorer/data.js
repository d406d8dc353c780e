// Data: inflates what the page holds. explorer/pack.py writes the format and tells it.

const TYPES = {
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  float32: Float32Array,
};

/** The bytes of a block of the page, or null if the page has none of that name. */
async function inflated(name) {
  const element = document.getElementById("data-" + name);
  if (!element) return null;
  const text = atob(element.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed])
    .stream()
    .pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function inflatedText(name) {
  const bytes = await inflated(name);
  return bytes && new TextDecoder().decode(bytes);
}

/** Columns by name, each {values, shape}; null if the page has no such block. */
async function columnsOf(name) {
  const bytes = await inflated(name);
  if (!bytes) return null;
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const body = bytes.subarray(4 + length),
    columns = {};
  for (const about of header) {
    const Type = TYPES[about.type],
      size = Type.BYTES_PER_ELEMENT;
    const count = about.shape.reduce((product, n) => product * n, 1);
    const octets = new Uint8Array(count * size);
    for (let plane = 0; plane < size; plane++)
      for (let i = 0; i < count; i++)
        octets[i * size + plane] = body[about.at + plane * count + i];
    const values = new Type(octets.buffer);
    if (about.differences && count) {
      const row = count / about.shape[0];
      for (let i = row; i < count; i++) values[i] += values[i - row];
    }
    columns[about.name] = { values, shape: about.shape };
  }
  return columns;
}

/** Everything on the page: facts, the text's columns, those of each layer, matrices. */
async function load() {
  const facts = JSON.parse(await inflatedText("facts"));
  const names = facts.layers.map((_, index) => "layer" + index);
  const [matrices, text, ...layers] = await Promise.all(
    ["matrices", "text", ...names].map(columnsOf),
  );
  return { facts, matrices, text, layers };
}

/** What a router decided for token i in a layer: its choices, best first, and alternatives. */
function decisionsOf(data, layer, i) {
  const columns = data.layers[layer],
    about = data.facts.sample,
    n = about.tokens;
  const weight = (code, scale) => scale * (code / 255) ** 2;
  const choices = [],
    alternatives = [];
  for (let k = 0; k < about.choices; k++) {
    const expert = columns.expert.values[k * n + i];
    if (expert >= data.facts.num_experts) continue;
    const gate = weight(columns.gate.values[k * n + i], about.gateScale[layer]);
    choices.push({ expert, gate, kept: isKept(columns, n, i, k) });
  }
  for (let a = 0; a < about.alternatives; a++) {
    const expert = columns.other.values[a * n + i];
    if (expert >= data.facts.num_experts) continue;
    const probability = weight(
      columns.otherProbability.values[a * n + i],
      about.otherScale[layer],
    );
    alternatives.push({ expert, probability });
  }
  return { choices, alternatives };
}

function isKept(columns, n, i, k) {
  return (columns.kept.values[(k >> 3) * n + i] >> (k & 7)) & 1 ? true : false;
}
