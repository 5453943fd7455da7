"""Texts on which tokenizers tend to differ: code, digits, scripts, spaces, emoji, added tokens in unusual places."""
# ruff: noqa: RUF001  (these texts need characters that look like others)

from __future__ import annotations

# Added tokens: like a word, like a control token, with a space, with another added token as its start.
ADDED = ("<lamp>", "<|ship|>", "fog bank", "<lamp><lamp", "naïve")

WORDS = (
    "",
    "a",
    " ",
    "Hello, world!",
    "The keeper counts the ships",
    "I'm sure they've said we'll go; it's John's, 'tis",
    "I'M SURE THEY'VE SAID WE'LL GO",
    "  leading and trailing  ",
    "CamelCaseWord snake_case_word kebab-case-word SCREAMING_CASE",
    "don't can't won't y'all'd've",
    "a'b'c 'd' ''e''",
    "end.Start of,the;next:sentence!now?yes",
    "...!!!???---___***///",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "$100 €50 £20 ¥1000 50% #1 @home",
    "“quoted” ‘single’ — dash – en … ellipsis",
    "e-mail: someone@example.com, see https://example.com/a?b=c&d=e#f",
    "word" * 20,
)
DIGITS = (
    "0",
    "7 42 365 1988 12345 123456 1234567 12345678",
    "3.14159 2,718 1e10 0x1F 1_000_000",
    "1988-11-23T08:30:00Z",
    "abc123def456 v1.2.3-rc4 h264",
    "½ ¾ ² ³ ₂ Ⅷ ٣ ४ 一二三",
    "1 22 333 4444 55555 666666 7777777",
    "01 001 0001",
)
CODE = (
    "def count(ships):\n    return sum(1 for ship in ships if ship['name'] != \"\")\n",
    "if (a && b || !c) { x[i] += y->z; } // comment",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 0); }',
    "SELECT * FROM t WHERE a >= 10 AND b <> 'x';",
    '<div class="a b">text</div>',
    "\tindented\n\t\ttwice\n",
    "x=1;y=2\r\nz=3\r\n",
    "λx.x ∀x∈ℝ: x²≥0",
    '{"key": [1, 2.5, null, true]}',
    "```python\nprint('hi')\n```",
)
SPACES = (
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n a",
    " \n \n ",
    "\t\t \t",
    "a  b   c    d",
    "a \n b",
    "a\n\nb\n \nc",
    "a\r\n\r\nb",
    "trailing spaces   \n   next",
    "nbsp\u00a0here\u2003em\u2009thin\u3000wide",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "line\u2028sep\u2029para\x85nel",
    "tab\tnew\nret\rvt\x0bff\x0c",
)
SCRIPTS = (
    "Le café était fermé",
    "Ünïcödé ßtraße Œuvre Ångström",
    "Привет, мир! Ещё раз.",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "កាន់តែពិសេសអាច",
    "灯台守は夜の船を数える。",
    "我想在apple工作1314151天～",
    "안녕하세요 세계",
    "ﬁ ﬂ ｆｕｌｌ ｗｉｄｔｈ",
    "𝒳 𝔘 𐐀 𐍈 🜁",
    "İstanbul ıİ ǅ ŉ",
)
EMOJI = (
    "😀",
    "🚀 (normal) 😶\u200d🌫️ (multiple) ✅ 🦙🦙",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪 ❤️",
    "a😀b😀 c 😀",
    "☃☂★ ♥ ✓ ©®™",
    "\U0001f468\u200d\U0001f4bb1",
)
COMBINING = ("e\u0301", "cafe\u0301 na\u0308ive", "\u0301alone", "a\u0300\u0301\u0302b", "\u1112\u1161\u11ab")
TOKENS = (
    "<|im_start|>",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b",
    "<|im_end|><|im_end|>",
    " <|im_end|> ",
    "<|im_end|>\n\n<|pad|>",
    "<|im_start",
    "<lamp>",
    "the<lamp>light",
    "the <lamp> light",
    "<lamp><lamp>",
    "<lamp><lamp><lamp",
    "<lamp><|ship|><lamp>",
    "12<lamp>34",
    "<|ship|>s and un<|ship|>ed",
    "fog bank",
    "a fog bankrupt",
    "naïve",
    "unnaïvely naïve",
    "<lam p><Lamp>",
    "灯<lamp>台",
    "\n<lamp>\n",
    "<lamp>'s",
)
TEXTS = (*WORDS, *DIGITS, *CODE, *SPACES, *SCRIPTS, *EMOJI, *TOKENS)

# All pairs: runtimes differ where a pre-tokenizer splits at the border of two kinds of characters.
EDGES = (
    *("a", "Bc", " the", "'s", "'LL", "7", "1988", " 42", "!", "...", "$", " (", "_", "/", "\n", "\r\n", " ", "   "),
    *("\t", " \n", "é", "灯台", "한", "ب", "न", "€", "½", "😀", "\u3000", "<lamp>", "<|ship|>", "<|im_end|>"),
)
BORDERS = tuple(left + right for left in EDGES for right in EDGES)
ALL_TEXTS = (*TEXTS, *COMBINING, *BORDERS)
