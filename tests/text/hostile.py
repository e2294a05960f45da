"""Names of classes, runs and files as somebody who means harm writes them."""

END = "<!-- /rescom_timm:data -->"
FAKE = "<!-- rescom_timm:limits 0123456789ab -->"
TERMINAL = [
    "\x1b]52;c;bWU=\x07",
    "a\x9b31mred",
    "cat\u202egnp.exe",
    "\u2066isolated",
    "line\u2028two",
    "\rover",
    "\x7f",
]
MARKUP = [
    "</script><script>alert(1)</script>", "<img src=http://evil/x onerror=alert(1)>", "[x](javascript:alert(1))",
    "![](http://evil/track.png)", "# heading", "a | b | c", "`code` ``` ~~~", "two\n\n# lines\n---\n- item", END, FAKE,
    f"{END}\n\n# mine", "<https://evil/>", "*bold* __bold__ ~~no~~ $x$", "&lt;b&gt; \\[x](y)", "--- \\| :-: |",
]  # fmt: skip
ALL = MARKUP + TERMINAL
CONTROLS = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2066, 0x200F, 0x2028)]
