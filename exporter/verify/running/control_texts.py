"""Texts of different kinds, such as prose, code and dialogue, for comparing the logits of two models."""

from __future__ import annotations

from typing import Final

#: Run by every artifact in every run mode: prose, code, digits, other scripts, dialogue.
CONTROL_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, and then it rests under the old oak tree.",
    "def add(a, b):\n    return a + b\n\nprint(add(1999, 42))",
    "In 1969, 600 million people watched 2 astronauts walk 384,400 km away from home.",
    "Der Zug fährt um 7:45 Uhr ab; les élèves déjeunent à midi. 今日は良い天気です。",
    "User: What is the capital of France?\nAssistant: The capital of France is Paris.",
)

#: Run once in addition, for checks of a mean over positions, which needs many positions.
MORE_TEXTS: Final = (
    "The harbour was still dark when the first boats came in. Nobody spoke on the quay; the crates were passed from "
    "hand to hand, and the gulls, who knew the hour as well as the fishermen did, waited on the roof of the ice house.",
    "import csv\n\n\ndef totals(path):\n    with open(path, newline='') as file:\n        rows = list(csv.reader(file))"
    "\n    return {row[0]: sum(float(cell) for cell in row[1:]) for row in rows if row}\n",
    "Revenue rose from 1,204.5 to 1,377.9 million (+14.4 %), while costs fell by 3.25 % to 861.07 million; "
    "the margin of 37.5 % is 10.8 points above that of 2019, and 0.6 below the plan of 38.1 %.",
    "Am Abend saßen die Nachbarn vor dem Haus und redeten über den trockenen Sommer, die Preise für Holz und darüber, "
    "ob die Brücke im nächsten Jahr endlich wieder für Lastwagen geöffnet wird.",
    "User: My bread does not rise. What am I doing wrong?\nAssistant: Check the yeast first: stir it into warm water "
    "with a little sugar. If there is no foam after ten minutes, it is too old.\nUser: There is foam.",
    "Le marché se tient chaque samedi sur la place de l'église ; on y trouve du miel, des fromages de chèvre et, dès "
    "le mois de juin, les premières cerises de la vallée.",
    '{"id": 4711, "name": "pump-03", "tags": ["north", "spare"], "limits": {"min": -12.5, "max": 80}, "active": true, '
    '"history": [{"at": "2024-05-17T08:30:00Z", "value": 41.2}, {"at": "2024-05-18T08:30:00Z", "value": null}]}',
    "Зимой снег на крышах темнел, и по утрам было слышно, как капает вода. Дети строили запруды около самых ворот.",
    "To prove that the sum of two odd numbers is even, write them as 2a + 1 and 2b + 1. Their sum is 2a + 2b + 2, "
    "which is 2(a + b + 1), and that is twice a whole number.",
    "El tren llegó con dos horas de retraso porque un árbol había caído sobre la vía; los viajeros, cansados, bajaron "
    "a buscar café mientras los obreros cortaban el tronco.",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; ++i) {\n        if (i % 3 == 0) continue;\n"
    '        printf("%d: %d\\n", i, i * i);\n    }\n    return 0;\n}\n',
    "昨天下午我们去了河边的旧书店,老板正在整理一批刚收来的地图。その店は夜の八時まで開いている。",
    "# Setting up\n\n1. Unpack the archive into an empty folder.\n2. Copy `settings.example.toml` to `settings.toml`.\n"
    "3. Set `port` (default: 8080) and **restart** the service.\n\n| key | type |\n|---|---|\n| port | integer |\n",
    "Dear Ms. Okafor,\n\nthank you for your letter of 3 March. We are glad to confirm the meeting on Tuesday at "
    "half past nine; please bring the signed copy of the contract, and a second one for our files.\n\nYours sincerely",
)
