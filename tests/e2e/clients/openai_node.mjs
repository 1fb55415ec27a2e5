// What the official Node client asks and gets: one JSON object on stdout.
import OpenAI from "openai";

const model = process.env.MODEL;
const client = new OpenAI({
  baseURL: process.env.BASE_URL,
  apiKey: "none",
  maxRetries: 0,
  timeout: 60_000,
  // Two engines do not say the same, word for word.
  defaultHeaders: { "X-Isthmus-Route": "split" },
});
const messages = [{ role: "user", content: "Name three rivers." }];
const found = {};

found.models = (await client.models.list()).data.map((each) => each.id);

const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 12 });
found.whole = whole.choices[0].message.content;
found.usage = whole.usage;

const stream = await client.chat.completions.create({
  model,
  messages,
  temperature: 0,
  max_tokens: 12,
  stream: true,
  stream_options: { include_usage: true },
});
found.streamed = "";
for await (const chunk of stream) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  found.streamed_usage = chunk.usage;
}

const parameters = {
  type: "object",
  properties: { town: { type: "string", maxLength: 12 } },
  required: ["town"],
  additionalProperties: false,
};
const called = await client.chat.completions
  .stream({
    model,
    messages,
    temperature: 0,
    max_tokens: 60,
    tools: [{ type: "function", function: { name: "weather", parameters } }],
    tool_choice: "required",
    parallel_tool_calls: false,
  })
  .finalChatCompletion();
found.calls = called.choices[0].message.tool_calls.map((call) => call.function);
found.called_reason = called.choices[0].finish_reason;

const schema = {
  type: "object",
  properties: { river: { type: "string", maxLength: 12 } },
  required: ["river"],
  additionalProperties: false,
};
const parsed = await client.chat.completions.parse({
  model,
  messages,
  temperature: 0,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "river", strict: true, schema } },
});
found.parsed = JSON.parse(parsed.choices[0].message.content);

const completion = await client.completions.create({ model, prompt: ["One, two,", "A, B,"], max_tokens: 3, logprobs: 1 });
found.completions = completion.choices.map((choice) => [choice.index, choice.logprobs.tokens.length]);

try {
  await client.chat.completions.create({ model, messages, temperature: 9 });
} catch (error) {
  found.refused = { name: error.constructor.name, status: error.status, param: error.param, code: error.code };
}
try {
  await client.chat.completions.create({ model: "gpt-9", messages });
} catch (error) {
  found.unknown = { name: error.constructor.name, status: error.status };
}

// Leaves in the middle of an answer.
const left = await client.chat.completions.create({ model, messages, max_tokens: 1500, ignore_eos: true, stream: true });
for await (const chunk of left) {
  if (chunk.choices[0]?.delta?.content) break;
}
left.controller.abort();

console.log(JSON.stringify(found));
