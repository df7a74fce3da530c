const HELP = `Ask a served model from Node.js, with nothing but the protos.

    npm install @grpc/grpc-js protobufjs
    node examples/ask.mjs --help

First serve something, for example what the demo has made:

    keras-mrl demo
    keras-mrl serve --model_name digits --model_base_path keras-mrl-demo/models/digits --port 8500
    node examples/ask.mjs

What happens, and what to look at:

1. The manifest is read: what the model takes, its dims, its exits.
2. Rows are classified adaptively: each answer says at which exit and dim it was decided.
3. The same rows are embedded with few dims.

  --target HOST:PORT   of the server (localhost:8500)
  --model NAME         (digits)
  --rows FILE          JSON, a list of rows as the model takes them (two digits, drawn below)
  --protos FILE        _wire.proto (that of this repository)
`;

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

const DIGITS = [
  ["..####..", ".#....#.", "......#.", "...###..", "......#.", "......#.", ".#....#.", "..####.."],
  ["...##...", "..###...", "...##...", "...##...", "...##...", "...##...", "...##...", "..####.."],
];
const FLOAT = 1, INT32 = 3, STRING = 7, INT64 = 9; // of the enum DataType

const options = {
  help: { type: "boolean", default: false },
  target: { type: "string", default: "localhost:8500" },
  model: { type: "string", default: "digits" },
  rows: { type: "string" },
  protos: {
    type: "string",
    default: new URL("../serving/keras_mrl_serving/_wire.proto", import.meta.url).pathname,
  },
};
const { values: given } = parseArgs({ options });
if (given.help) {
  console.log(HELP);
  process.exit();
}

const { default: grpc } = await import("@grpc/grpc-js");
const { default: protobuf } = await import("protobufjs");
const wire = protobuf.loadSync(given.protos);
const Request = wire.lookupType("keras_mrl.wire.PredictRequest");
const Response = wire.lookupType("keras_mrl.wire.PredictResponse");
const client = new grpc.Client(given.target, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": -1, // the limit of 4 MB is the client's
});

function ask(signatureName, inputs) {
  const request = { modelSpec: { name: given.model, signatureName }, inputs };
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(
      "/tensorflow.serving.PredictionService/Predict",
      (message) => Buffer.from(Request.encode(Request.fromObject(message)).finish()),
      (bytes) => Response.decode(bytes),
      request,
      new grpc.Metadata(),
      { deadline: Date.now() + 10_000 },
      (error, answer) => (error ? reject(error) : resolve(answer.outputs)),
    );
  });
}

function write(rows) {
  const sizes = [];
  for (let own = rows; Array.isArray(own); own = own[0]) sizes.push({ size: own.length });
  const values = rows.flat(Infinity);
  const tensorShape = { dim: sizes };
  if (typeof values[0] === "string") {
    return { dtype: STRING, tensorShape, stringVal: values.map((text) => Buffer.from(text)) };
  }
  const bytes = new Uint8Array(Float32Array.from(values).buffer); // little-endian, as the server's
  return { dtype: FLOAT, tensorShape, tensorContent: bytes };
}

// A server answers in a field of the dtype, or as bytes; the last value of a field repeats.
function read(tensor) {
  const size = tensor.tensorShape.dim.reduce((product, dim) => product * Number(dim.size), 1);
  const fields = {
    [FLOAT]: ["floatVal", 4, "readFloatLE"],
    [INT32]: ["intVal", 4, "readInt32LE"],
    [INT64]: ["int64Val", 8, "readBigInt64LE"],
  };
  if (tensor.dtype === STRING) return tensor.stringVal.map((text) => Buffer.from(text).toString());
  const [field, width, from] = fields[tensor.dtype];
  const bytes = Buffer.from(tensor.tensorContent);
  const values = bytes.length
    ? Array.from({ length: size }, (_, i) => bytes[from](i * width))
    : tensor[field];
  return Array.from({ length: size }, (_, i) => Number(values[Math.min(i, values.length - 1)]));
}

const described = await ask("describe", { key: write([""]) });
const manifest = JSON.parse(read(described.manifest)[0]);
if (manifest.schema !== 1) throw new Error(`schema ${manifest.schema} is of a later version`);
const [input] = Object.keys(manifest.inputs);
const rows = given.rows
  ? JSON.parse(readFileSync(given.rows, "utf8"))
  : DIGITS.map((digit) => digit.map((line) => [...line].map((c) => [c === "#" ? 1 : 0])));
console.log(`${manifest.name} takes ${input}, and answers with ${manifest.dims.join(", ")} dims`);

const narrow = manifest.dims[0], wide = manifest.dims.at(-1);
const { embedding } = await ask(`embed_${narrow}`, { [input]: write(rows) });
console.log(`embeddings of ${read(embedding).length / rows.length} numbers, where the whole ones have ${wide}`);

const stages = manifest.exit_cascade?.exit_stages ?? manifest.cascade?.stages;
if (stages) {
  const answer = await ask("classify_adaptive", { [input]: write(rows) });
  const classes = read(answer.labels ?? answer.classIds); // the best first, for each row
  const dims = read(answer.dim);
  const exits = answer.exit && read(answer.exit).map((i) => manifest.exits[i].name);
  const costs = rows.map((_, i) => {
    const exit = exits?.[i];
    console.log(`row ${i}: ${classes[(i * classes.length) / rows.length]}, with ${dims[i]} dims${exit ? ` at exit ${exit}` : ""}`);
    const stage = stages.find((own) => own.dim === dims[i] && (own.exit ?? "last") === (exit ?? "last"));
    return stage.relative_cost ?? stage.dim / wide;
  });
  const mean = costs.reduce((sum, cost) => sum + cost, 0) / costs.length;
  console.log(`gained: ${Math.round(100 * mean)}% of the multiply-adds of the whole model, on average of these rows`);
}
client.close();
