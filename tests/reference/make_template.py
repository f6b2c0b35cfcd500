"""Writes tests/golden/templates: conversations of InternVL with InternLM2, rendered and marked by transformers.

The template is the one that InternVL defines as `internlm2-chat` (a system message, roles in ChatML's marks, nothing
between `<|im_end|>` and the next mark), here in Jinja. Its `generation` block covers an answer with its end, which is
what InternVL's preprocessing learns. The tokenizer is a small byte-level BPE with InternLM2's special tokens.

    python tests/reference/make_template.py
"""

import json

import tokenizers
from common import GOLDEN
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# (turns, system message, tiles of each image, tokens of a tile)
CASES = (
    ([("<image>\nWhat is this?", None)], None, [1], 4),
    ([("What is this?", None)], None, [2], 4),  # an image without a mark stands first
    ([("<image>\nWhat is this?", "A cat."), ("And its colour?", None)], None, [3], 4),
    ([("<image>\nWhat is this?", "A cat."), ("And its colour?", "Black.")], None, [3], 4),
    ([("First: <image>\nsecond: <image>\nCompare them.", "They differ.")], None, [2, 1], 4),
    ([("Is it <image> or", "This: 12"), ("<image>?", "that: 3")], "Be brief.", [1, 1], 2),
    ([("你好", "你好！ naïve ✓")], None, [], 256),
    ([("Hello", "Hi!"), ("1+1?", "2"), ("bye", None)], "You are terse.", [], 256),
    ([("<image>\n", None)], None, [7], 1),
    # In training the text of each turn is stripped, the mark's line end too.
    ([("  <image>\nWhat?\n", " a\n cat \n")], " Be brief. ", [1], 4),
)


def make_tokenizer():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    text = [text for turns, *_ in CASES for turn in turns for text in turn if text] + ["user\n", "assistant\n"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    model.train_from_iterator(text * 3, trainer)
    return model


def messages(turns, system, tiles, tokens_per_tile):
    """What the template gets: images as their tokens, answers that are to come left out."""
    found, remaining = [{"role": "system", "content": SYSTEM if system is None else system}], list(tiles)
    if tiles and not any("<image>" in question for question, _ in turns):
        turns = [("<image>\n" * len(tiles) + turns[0][0], turns[0][1]), *turns[1:]]
    for question, answer in turns:
        while "<image>" in question:
            context = "<IMG_CONTEXT>" * (remaining.pop(0) * tokens_per_tile)
            question = question.replace("<image>", f"<img>{context}</img>", 1)
        found.append({"role": "user", "content": question})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found


def described(tokenizer, turns, system, tiles, tokens_per_tile):
    """-> a case: what goes in; the text, its ids, and which of them are learned."""
    case = dict(turns=turns, system=system, tiles=tiles, tokens_per_tile=tokens_per_tile)
    training = all(answer is not None for _, answer in turns)
    if training:
        turns = [(question.strip(), answer.strip()) for question, answer in turns]
    given = dict(chat_template=TEMPLATE, add_generation_prompt=not training)
    shown = messages(turns, system, tiles, tokens_per_tile)
    found = tokenizer.apply_chat_template(shown, return_dict=True, return_assistant_tokens_mask=True, **given)
    text = tokenizer.apply_chat_template(shown, tokenize=False, **given)
    learned = [i for i, mark in enumerate(found["assistant_masks"]) if mark]
    return case | dict(prompt=text.removeprefix("<s>"), ids=list(found["input_ids"]), learned=learned)


def main():
    folder, model = GOLDEN / "templates", make_tokenizer()
    folder.mkdir(exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    cases = [described(tokenizer, *case) for case in CASES]
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(model.to_str()), separators=(",", ":")))
    (folder / "internlm2-chat.json").write_text(
        "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n"
    )
    print({path.name: path.stat().st_size for path in folder.iterdir()})


if __name__ == "__main__":
    main()
