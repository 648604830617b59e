// What responses say of an answer, in words.

const number = new Intl.NumberFormat("en");
export const count = (n, what) => `${number.format(n)} ${what}${n === 1 ? "" : "s"}`;
export const percent = (share) => `${number.format(Math.round(1000 * share) / 10)} %`;

export function seconds(s) {
  if (s < 0.05) return "under 0.1 s";
  if (s < 99.5) return `${s < 9.95 ? s.toFixed(1) : Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  return minutes < 100 ? `${minutes} min` : `${(s / 3600).toFixed(1)} h`;
}

const READ_FOR = {
  "another question": "The text was read for an earlier question, and what that one did not need may be missing here.",
  "no question": "The text was read before there was a question.",
};

/** The line under an answer. */
export function summary(apb, first, all) {
  const blocks = apb.plan.blocks > 1 ? ` in ${count(apb.plan.blocks, "block")}` : "";
  const parts = [`${seconds(first)} to the first word, ${seconds(all)} in all.`];
  parts.push(apb.exact ? "Exact: nothing was approximated." : `Approximate: ${apb.strategy}${blocks}.`);
  if (!apb.exact && READ_FOR[apb.read_for]) parts.push(READ_FOR[apb.read_for]);
  return [...parts, ...(apb.notes || [])].join(" ");
}

/** Pairs of a name and what it was. */
export function details(apb, usage) {
  const { plan, timing, decode, question } = apb;
  const told = [["Reading", `${apb.strategy}${apb.exact ? ", exact" : ", approximate"}`]];
  if (apb.choice) told.push(["Why", apb.choice]);
  if (plan.blocks > 1) {
    told.push(["Blocks", `${number.format(plan.blocks)}, each of about ${count(Math.ceil(plan.document_tokens / plan.blocks), "token")}`]);
    if (plan.anchor_length) told.push(["Seen by every block", count(plan.anchor_length, "token")]);
    if (plan.passing_length) {
      told.push(["Passed on by a block", `${count(plan.passing_length, "token")} for each layer and KV head`]);
    }
  }
  if (apb.read_for) told.push(["Read for", apb.read_for]);
  told.push(["Keys that answering looked at", `${percent(decode.share)}${decode.exact ? "" : `, chosen by ${decode.method}`}`]);
  if (question) told.push(["Taken for the question", `${count(question.tokens, "token")}`]);
  if (usage) told.push(["Tokens", `${number.format(usage.prompt_tokens)} read, ${number.format(usage.completion_tokens)} written`]);
  told.push(["Prefill", seconds(timing.prefill_s)], ["Decode", seconds(timing.decode_s)]);
  return told;
}

/** The sentence above the text. */
export function legend(apb, { data, went_on }) {
  const parts = [];
  if (data.length) {
    parts.push("Marked is what the blocks passed on most: the stronger, the more layers and heads chose it.");
  }
  if (went_on.length) parts.push("What went through the upper layers is in bold type.");
  if (parts.length) return parts.join(" ");
  if (apb && !apb.exact) return `Under ${apb.strategy} the blocks passed nothing on.`;
  return "Nothing had to be passed on: it was read as one.";
}
