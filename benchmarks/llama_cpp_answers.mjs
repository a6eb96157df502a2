// Greedy answers of one model in llama.cpp, for benchmarks/gguf_agree.py:
//
//     node llama_cpp_answers.mjs MODULES GGUF THREADS TOKENS
//
// MODULES: a folder in which npm has installed node-llama-cpp. Texts come as a JSON list on stdin, special tokens written
// out in them; for each, {prompt, answer} goes to stdout, both as token ids. The token that ends an answer is one of it.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, gguf, threads, tokens] = process.argv.slice(2);
const main = createRequire(`${modules}/package.json`).resolve("node-llama-cpp");
const { getLlama } = await import(pathToFileURL(main).href);
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads) });
const model = await llama.loadModel({ modelPath: gguf, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 1024, threads: Number(threads) });
const sequence = context.getSequence();

const answers = [];
for (const text of JSON.parse(readFileSync(0, "utf8"))) {
    const prompt = model.tokenize(text, true);
    const answer = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        answer.push(token);
        if (model.isEogToken(token) || answer.length === Number(tokens)) break;
    }
    answers.push({ prompt, answer });
}
console.log(JSON.stringify(answers));
process.exit(0);
