"""The integers 0 to 999 999 in words: spell("fr", 1987) == "mille neuf cent quatre-vingt-sept".

Each language is one function of n, by its schoolbook rules; README.md lists the choices where usage varies.
`python spell.py fr 1987` prints one number.
"""

import sys


def english(n):
    """nine hundred eighty-seven thousand six hundred five: no "and", a hyphen within the tens."""
    small = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen"
    ).split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    if n < 20:
        return small[n]
    if n < 100:
        return tens[n // 10 - 2] + ("-" + small[n % 10] if n % 10 else "")
    unit, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    return f"{english(n // unit)} {name}" + (" " + english(n % unit) if n % unit else "")


def french(n, last=True):
    """quatre-vingts, deux cents, but quatre-vingt-un, deux cent un, and no s before mille (last=False)."""
    small = (
        "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
        "dix-sept dix-huit dix-neuf"
    ).split()
    tens = {20: "vingt", 30: "trente", 40: "quarante", 50: "cinquante", 60: "soixante", 80: "quatre-vingt"}
    s = "s" if last else ""
    if n < 20:
        return small[n]
    if n < 100:
        base = n // 20 * 20 if n >= 60 else n // 10 * 10  # 60 and 80 count on to 19
        rest = n - base
        if rest == 0:
            return tens[base] + (s if base == 80 else "")
        joint = " et " if rest in (1, 11) and base != 80 else "-"
        return tens[base] + joint + small[rest]
    if n < 1000:
        head = "cent" if n < 200 else small[n // 100] + " cent"
        if n % 100:
            return head + " " + french(n % 100, last)
        return head + (s if n >= 200 else "")
    head = "mille" if n < 2000 else french(n // 1000, last=False) + " mille"
    return head + (" " + french(n % 1000) if n % 1000 else "")


def italian(n):
    """One word; tens lose their vowel before uno and otto, cento before otto and ottanta; a final tre has an accent."""

    def word(n):
        small = (
            " uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
            "diciassette diciotto diciannove"
        ).split(" ")
        tens = "venti trenta quaranta cinquanta sessanta settanta ottanta novanta".split()
        if n < 20:
            return small[n]
        if n < 100:
            ten = tens[n // 10 - 2]
            return (ten[:-1] if n % 10 in (1, 8) else ten) + small[n % 10]
        if n < 1000:
            head = ("" if n < 200 else small[n // 100]) + "cento"
            rest = word(n % 100)
            return (head[:-1] if rest.startswith("ott") else head) + rest
        return ("mille" if n < 2000 else word(n // 1000) + "mila") + word(n % 1000)

    if n == 0:
        return "zero"
    text = word(n)
    return text[:-1] + "é" if text.endswith("tre") and n != 3 else text


def german(n):
    """One word; einhundert and eintausend in full; eins only at the end."""

    def word(n, one):
        small = (
            " ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
            "siebzehn achtzehn neunzehn"
        ).split(" ")
        tens = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
        if n == 1:
            return one
        if n < 20:
            return small[n]
        if n < 100:
            return (small[n % 10] + "und" if n % 10 else "") + tens[n // 10 - 2]
        if n < 1000:
            return small[n // 100] + "hundert" + word(n % 100, one)
        return word(n // 1000, "ein") + "tausend" + word(n % 1000, one)

    return word(n, "eins") or "null"


def spanish(n, one="uno"):
    """y between tens and units from 31; uno is shortened before mil (one="un"); never un mil."""
    small = (
        "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
        "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis "
        "veintisiete veintiocho veintinueve"
    ).split()
    tens = "treinta cuarenta cincuenta sesenta setenta ochenta noventa".split()
    hundreds = (
        "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
    ).split()
    if n == 1:
        return one
    if n == 21:
        return "veintiuno" if one == "uno" else "veintiún"
    if n < 30:
        return small[n]
    if n < 100:
        return tens[n // 10 - 3] + (" y " + spanish(n % 10, one) if n % 10 else "")
    if n == 100:
        return "cien"
    if n < 1000:
        return hundreds[n // 100 - 1] + (" " + spanish(n % 100, one) if n % 100 else "")
    head = "mil" if n < 2000 else spanish(n // 1000, "un") + " mil"
    return head + (" " + spanish(n % 1000) if n % 1000 else "")


LANGUAGES = {"en": english, "fr": french, "it": italian, "de": german, "es": spanish}


def spell(language, n):
    """The number n, 0 <= n <= 999 999, in words."""
    return LANGUAGES[language](n)


if __name__ == "__main__":
    print(spell(sys.argv[1], int(sys.argv[2])))
