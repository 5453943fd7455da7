// Greedy tokens of transformers.js, as its users get them: node generate.mjs LIBRARY FOLDER DTYPE TOKENS PROMPT...
// Prints a JSON list of {prompt: ids, chosen: ids}, one a prompt.
import { createRequire } from "node:module";
import path from "node:path";

const [library, folder, dtype, tokens, ...prompts] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, env } = createRequire(library)("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

const name = path.basename(folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, device: "cpu" });
const count = Number(tokens);
const results = [];
for (const prompt of prompts) {
  const inputs = tokenizer(prompt, { add_special_tokens: false });
  const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: count, min_new_tokens: count });
  const ids = output.tolist()[0].map(Number);
  const length = inputs.input_ids.dims[1];
  results.push({ prompt: ids.slice(0, length), chosen: ids.slice(length) });
}
console.log(JSON.stringify(results));
