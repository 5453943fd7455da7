// Greedy tokens of transformers.js, as its users get them: node generate.mjs LIBRARY FOLDER OPTIONS TOKENS PROMPT...
// OPTIONS: JSON, of from_pretrained: {"dtype": "q4"}
// Prints a JSON list of {prompt: ids, chosen: ids}, one a prompt.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [library, folder, options, tokens, ...prompts] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, env } =
  createRequire(library)("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
// An encoder-decoder's output begins with its start token, any other's with the prompt.
const seq2seq = JSON.parse(readFileSync(path.join(folder, "config.json"), "utf-8")).is_encoder_decoder;
const auto = seq2seq ? AutoModelForSeq2SeqLM : AutoModelForCausalLM;
const model = await auto.from_pretrained(name, { ...JSON.parse(options), device: "cpu" });
const count = Number(tokens);
const results = [];
for (const prompt of prompts) {
  const inputs = tokenizer(prompt, { add_special_tokens: false });
  const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: count, min_new_tokens: count });
  const ids = output.tolist()[0].map(Number);
  const given = inputs.input_ids.tolist()[0].map(Number);
  results.push({ prompt: given, chosen: ids.slice(seq2seq ? 1 : given.length) });
}
console.log(JSON.stringify(results));
