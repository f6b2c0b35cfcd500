"""Made-up answers with the scores that the published rules give them, worked out by hand."""

ANIMALS = ["cat", "dog", "bird", "fish"]
MAP = {"category": "VD", "l2-category": "map"}
FORMULA = "Handwritten Mathematical Expression Recognition"


def asked(answer, *options, **more):
    return {"answer": answer, "options": options, **more}


# Benchmark -> [(answer of the model, the row, its scores by VLMEvalKit, lmms-eval and InternVL; None = no rule)].
BY_HAND = {
    "TextVQA": [
        ("The Coca-Cola.", {"answers": ["coca cola"] * 4 + ["pepsi"] * 6}, (1, 1, 1)),
        ("red", {"answers": ["red"] * 3 + ["blue"] * 7}, (0.9, 0.9, 0.9)),  # (3 * 2/3 + 7) / 10
        ("No. 5.", {"answers": ["no 5"] * 10}, (0, 1, 1)),  # a full stop after a digit
        ("mum's", {"answers": ["mum 's"] * 10}, (0, 1, 1)),
        ("1,000-x", {"answers": ["1000x"] * 10}, (1, 0, 0)),  # beside 1,000 a mark leaves no blank
        ("im", {"answers": ["i'm"] * 10}, (0, 0, 0)),  # the table has I'm in capitals
    ],
    "DocVQA": [
        ("hello  wurld", {"answers": ["hello world", "x"]}, (1 - 1 / 11, 1 - 1 / 12, 1 - 1 / 12)),
        ("ab", {"answers": ["ax"]}, (0.5, 0.5, 0.5)),
        ("abc", {"answers": ["axx"]}, (0, 0, 0)),
    ],
    "ChartQA": [
        ("105.2", {"answer": "100", "split": "human_test"}, (0, 0, 1)),  # 5.2% of 100, 4.9% of 105.2
        ("95", {"answer": "100", "split": "human_test"}, (1, 1, 0)),  # 5% of 100, 5.3% of 95
        (" Blue ", {"answer": "blue", "split": "augmented_test"}, (1, 0, 1)),
        ("50%", {"answer": "0.51", "split": "augmented_test"}, (1, 1, 1)),
        ("0.0", {"answer": "0", "split": "augmented_test"}, (0, 0, 0)),
    ],
    "GQA": [
        ("left.", {"answer": "left"}, (0, 1, 1)),
        ("no!", {"answer": "no"}, (0, 1, 0)),
        (" yes", {"answer": "yes"}, (1, 0, 0)),
        ("Bus", {"answer": "Bus"}, (1, 1, 0)),
    ],
    "OCRBench": [
        ("The sign says Stop.", {"answers": ["go", "STOP"], "category": "Regular Text Recognition"}, (1, 1, None)),
        ("ＡＢＣ", {"answers": ["abc"], "category": "Scene Text-centric VQA"}, (0, 1, None)),
        ("x ^ 2\n", {"answers": ["x^2"], "category": FORMULA, "dataset": "HME100k"}, (1, 1, None)),
        ("X ^ 2", {"answers": ["x^2"], "category": FORMULA}, (0, 0, None)),
    ],
    "POPE": [
        ("Yes.", {"answer": "yes", "category": "random"}, (1, 0, 1)),
        ("There is no dog", {"answer": "no", "category": "random"}, (1, 0, 1)),
        ("not visible", {"answer": "no", "category": "popular"}, (0, 0, 1)),
        ("NO", {"answer": "no", "category": "popular"}, (1, 1, 0)),
        ("Well. No", {"answer": "no", "category": "popular"}, (1, 0, 0)),  # InternVL's first sentence
    ],
    "MME": [
        ("Y", {"answer": "Yes", "category": "count", "image": "1"}, (0, 1, 0)),
        ("不是", {"answer": "No", "category": "count", "image": "1"}, (0, 0, 1)),
        ("I think no", {"answer": "No", "category": "OCR", "image": "2"}, (1, 0, 0)),  # 'no' is not at the beginning
        ("true", {"answer": "Yes", "category": "OCR", "image": "2"}, (0, 0, 1)),
    ],
    "HallusionBench": [
        ("Yes, it does", {"answer": "Yes", "index": "h_VD_map_0_0_0", **MAP}, (1, None, None)),
        ("Yes and no", {"answer": "Yes", "index": "h_VD_map_0_1_0", **MAP}, (0, None, None)),
    ],
    "MMBench": [
        ("(B)", asked("B", "cat", "dog", index=1), (1, 1, 0)),
        ("the answer is A", asked("A", "red", "green", index=2), (1, 1, 0)),
        ("banana", asked("B", "plum", "banana", index=3), (1, 0, 1)),  # lmms-eval's options C and D are 'nan'
        ("I cannot tell", asked("B", "yes", "no", index=4), (0, 1, 1)),  # longer than twice 'yes' and 'no'
        ("Cannot determine the answer: no", asked("B", "yes or else", "no"), (0, 1, 1)),
        ("", asked("A", "cat", "dog", index=6), (0, 0, 0)),  # InternVL stops
    ],
    "MMMU multiple-choice": [
        ("A B", asked("B", *ANIMALS), (0, 1, 0)),
        ("I am quite sure it is the dog there", asked("B", *ANIMALS), (0, 1, 1)),
        ("C) bird", asked("C", *ANIMALS), (1, 0, 1)),
        ("Not a cat, but (B)", asked("B", *ANIMALS), (1, 1, 0)),
    ],
    "MMMU open": [
        ("approximately 41.999", {"answer": "42"}, (0, 1, 1)),
        ("-7", {"answer": "7"}, (1, 0, 0)),
        ("so it is Rome\nor London", {"answer": ["Paris", "Rome"]}, (0, 1, 1)),
        ("apple", {"answer": "a"}, (1, 0, 0)),
    ],
    "MMMU": [
        ("A B", asked("B", *ANIMALS, category="Art"), (0, 1, 0)),
        ("-7", {"answer": "7", "category": "Math"}, (1, 0, 0)),
    ],
    "SEED": [
        ("a", asked("A", "yes", "no", question_type_id=1), (0, 1, 0)),
        ("Answer: D", asked("D", *ANIMALS, question_type_id=1), (1, 0, 0)),
        (" B.", asked("B", *ANIMALS, question_type_id=10), (1, 1, 0)),
        ("B.", asked("B", *ANIMALS, question_type_id=10), (1, 1, 1)),
    ],
    "ScienceQA": [
        ("(C)", asked("C", *ANIMALS), (1, 0, 1)),
        ("b. two", asked("B", *ANIMALS), (0, 0, 0)),
        ("B. dog", asked("B", *ANIMALS), (1, 1, 1)),
        ("d", asked("D", *ANIMALS), (0, 1, 0)),
        ("(x", asked("D", *ANIMALS), (0, 0, 0)),  # InternVL stops
    ],
    "AI2D": [
        ("C. bird", asked("C", *ANIMALS), (1, 1, 0)),
        ("(c)", asked("C", *ANIMALS), (0, 1, 0)),
        (" c ", asked("C", *ANIMALS), (0, 0, 1)),
    ],
}  # fmt: skip
