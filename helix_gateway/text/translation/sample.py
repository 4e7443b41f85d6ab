"""A little text of many kinds, on which two tokenizers are compared when a draft model is loaded."""

SAMPLE_TEXT = """\
The harbour was quiet when Margaret walked down from the station. She hadn't slept well, and the wind off the water \
made her eyes sting; still, she stopped to watch the boats. "You're early," said the ferryman, who was untangling a \
rope. Twenty-three years ago there had been fifty ships here. Now there were only four, and one of them was for sale.

# How to reset the counter
1. Hold the button for 10 seconds, until the light turns green.
2. Let go, then press it twice. If nothing happens, see section 4.2 (page 117) or call +44 20 7946 0958.
- It works with **batteries** as well as `AC 230 V`, at temperatures between -5 and 40 degrees.

def moving_average(values: list[float], width: int = 3) -> list[float]:
    \"\"\"Mean of each window of `width` neighbours.\"\"\"
    if width <= 0:
        raise ValueError(f"width must be positive, not {width}")
    return [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]

{"id": 48213, "name": "Ana María", "tags": ["new", "unread"], "ratio": 0.3125, "parent": null, "ok": true}
<div class="card"><a href="https://example.org/path?q=1&amp;lang=en">Read more&hellip;</a></div>
for (int i = 0; i < n; ++i) {\n\tif (a[i] != b[i]) return i;\n}\n
The function f(x) = x^2 + 3x - 7 has its minimum at x = -1.5, because f'(x) = 2x + 3 is zero there. Therefore the \
smallest value is f(-1.5) = -9.25. Photosynthesis converts carbon dioxide and water into glucose and oxygen, using \
energy from sunlight; chlorophyll absorbs mostly blue and red light, which is why leaves look green.
Der Zug fährt über die Brücke nach Köln. La niña preguntó por qué el cielo es azul. L'été dernier, nous étions à Nîmes.
Привет, как дела? 今天天气很好。 これはペンです。 مرحبا بالعالم ไทย 한국어 ✅ 🙂 — “quotes” … €12,50
"""
