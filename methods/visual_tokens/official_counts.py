"""Heads kept per layer by the released LLaVA-1.5-7B masks.

Counted from the three boolean masks in the paper's repository; which heads they keep is not
reproduced here. The counts of the 13B masks are only partly known, so they are left out.
"""

# fmt: off
OFFICIAL_COUNTS: dict[str, list[int]] = {
    "llava_7b_8": [
        32, 32, 0, 0, 1, 0, 1, 0, 4, 3, 5, 5, 10, 8, 18, 11,
        9, 10, 9, 11, 15, 11, 11, 6, 11, 7, 10, 1, 4, 6, 2, 7,
    ],
    "llava_7b_16": [
        32, 32, 9, 5, 10, 4, 5, 15, 18, 13, 15, 20, 23, 24, 27, 23,
        27, 17, 14, 18, 18, 16, 15, 8, 14, 10, 15, 5, 7, 11, 5, 24,
    ],
    "llava_7b_24": [
        32, 32, 32, 19, 24, 17, 21, 27, 26, 23, 27, 24, 28, 31, 31, 27,
        29, 27, 23, 28, 25, 21, 20, 19, 18, 21, 20, 13, 18, 22, 16, 32,
    ],
}
# fmt: on
