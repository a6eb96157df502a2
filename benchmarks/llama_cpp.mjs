// One model in llama.cpp, for benchmarks/decode.py: node llama_cpp.mjs MODULES GGUF THREADS PROMPT TOKENS
//
// MODULES: a folder in which npm has installed node-llama-cpp. Prints the same measurements as JSON.

import { createRequire } from "node:module";
import { performance } from "node:perf_hooks";
import { pathToFileURL } from "node:url";

const [modules, gguf, threads, prompt, tokens] = process.argv.slice(2);
const main = createRequire(`${modules}/package.json`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(main).href);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads) });
const libraries = process.memoryUsage().rss;
const model = await llama.loadModel({ modelPath: gguf, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 512, threads: Number(threads) });
const sequence = context.getSequence();
const ids = Array.from({ length: Number(prompt) }, (_, place) => 1000 + place);

async function answer(count) {
    await sequence.clearHistory();
    const began = performance.now();
    const times = [];
    for await (const _ of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
        times.push(performance.now());
        if (times.length === count) break;
    }
    return [began, times];
}

await answer(8);
const [began, times] = await answer(Number(tokens));
console.log(JSON.stringify({
    tokens_per_second: 1000 * (times.length - 1) / (times.at(-1) - times[0]),
    first_token: (times[0] - began) / 1000,
    memory: process.memoryUsage().rss,
    libraries,
}));
process.exit(0);
