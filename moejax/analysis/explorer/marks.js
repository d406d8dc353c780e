// Marks: cells of colour and lines, as parts of Vega-Lite specifications.

const INK = "currentColor";
/** Stands out from every cell of both schemes. */
const PICKED = "#d81b60";
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];

const axis = (field, title, more = {}) => ({
  field,
  type: "quantitative",
  title,
  ...more,
});
const ordinal = (field, title, more = {}) => ({ field, type: "ordinal", title, ...more });

/** Cells of colour; numbers in them where there is room. */
function heat(rows, { x, y, value, title, scale, digits, picked, height }) {
  const few = new Set(rows.map((row) => row[x.field])).size <= 16;
  const layers = [
    {
      mark: { type: "rect", aria: false, tooltip: true },
      encoding: {
        color: {
          field: value,
          type: "quantitative",
          title,
          scale,
          legend: { gradientLength: 180 },
        },
      },
    },
  ];
  if (few && rows.length <= 256)
    layers.push({
      mark: { type: "text", fontSize: 10, aria: false },
      encoding: {
        text: { field: value, type: "quantitative", format: digits },
        color: { condition: { test: `${scale.light}`, value: "#fff" }, value: "#000" },
      },
    });
  if (picked)
    layers.push({
      transform: [{ filter: picked }],
      mark: {
        type: "rect",
        filled: false,
        fillOpacity: 0,
        stroke: PICKED,
        strokeWidth: 3,
        aria: false,
      },
    });
  delete scale.light;
  return { data: { values: rows }, height, encoding: { x, y }, layer: layers };
}

/** Lines by name: the one of the layer shown is thick, chance is dashed. */
function lines(rows, x, y, { point = false, whole = true } = {}) {
  const names = [...new Set(rows.map((row) => row.name))],
    places = [...new Set(rows.map((row) => row.x))];
  // Layers of an encoder-decoder are named, and stay in the order of their stacks.
  const named = typeof places[0] === "string";
  const ticks = whole && places.length <= 24 ? { values: places, format: "d" } : {};
  return {
    data: { values: rows },
    // No line goes on from one stack to the other.
    ...(named && {
      transform: [{ calculate: "split(datum.x, '.')[0]", as: "stack" }],
    }),
    height: 210,
    mark: {
      type: "line",
      point: point ? { size: 35 } : false,
      aria: false,
      tooltip: true,
    },
    encoding: {
      x: named
        ? ordinal("x", x, { sort: null, axis: { grid: false, labelAngle: 0 } })
        : axis("x", x, {
            scale: { zero: false, nice: false },
            axis: { grid: false, ...ticks },
          }),
      y: axis("y", y, { scale: { zero: true } }),
      ...(named && { detail: { field: "stack", type: "nominal" } }),
      strokeDash: {
        field: "name",
        type: "nominal",
        title: null,
        scale: { domain: names, range: names.map((_, i) => DASHES[i % 4]) },
      },
      color: {
        field: "name",
        type: "nominal",
        title: null,
        scale: { domain: names, scheme: "tableau10" },
      },
    },
  };
}
