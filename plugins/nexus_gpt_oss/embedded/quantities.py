"""The numbers of each kind of word problem: drawn so that every step has a whole, positive result named `answer`."""

from __future__ import annotations

from random import Random

Numbers = dict[str, int]


def gain(rng: Random) -> Numbers:
    a, b = rng.randint(12, 480), rng.randint(5, 390)
    return {"a": a, "b": b, "answer": a + b}


def loss(rng: Random) -> Numbers:
    a = rng.randint(40, 600)
    b = rng.randint(5, a - 5)
    return {"a": a, "b": b, "answer": a - b}


def rows(rng: Random) -> Numbers:
    a, b = rng.randint(3, 29), rng.randint(3, 25)
    return {"a": a, "b": b, "answer": a * b}


def share(rng: Random) -> Numbers:
    b, answer = rng.randint(2, 12), rng.randint(3, 60)
    return {"a": b * answer, "b": b, "answer": answer}


def leftover(rng: Random) -> Numbers:
    b, each = rng.randint(3, 15), rng.randint(3, 30)
    answer = rng.randint(1, b - 1)
    return {"a": b * each + answer, "b": b, "each": each, "full": b * each, "answer": answer}


def gain_then_loss(rng: Random) -> Numbers:
    a, b = rng.randint(15, 300), rng.randint(10, 200)
    c = rng.randint(3, a + b - 3)
    return {"a": a, "b": b, "sum": a + b, "c": c, "answer": a + b - c}


def change(rng: Random) -> Numbers:
    a, price = rng.randint(2, 12), rng.randint(2, 19)
    paid = (a * price // 50 + 1) * 50
    return {"a": a, "price": price, "cost": a * price, "paid": paid, "answer": paid - a * price}


def two_prices(rng: Random) -> Numbers:
    a, p, b, q = rng.randint(2, 15), rng.randint(2, 20), rng.randint(2, 15), rng.randint(2, 20)
    return {"a": a, "p": p, "b": b, "q": q, "first": a * p, "second": b * q, "answer": a * p + b * q}


def distance(rng: Random) -> Numbers:
    speed, hours = rng.randint(12, 95), rng.randint(2, 9)
    return {"speed": speed, "hours": hours, "answer": speed * hours}


def two_legs(rng: Random) -> Numbers:
    s, h, v, k = rng.randint(12, 70), rng.randint(2, 6), rng.randint(12, 70), rng.randint(2, 6)
    return {"s": s, "h": h, "v": v, "k": k, "first": s * h, "second": v * k, "answer": s * h + v * k}


def age(rng: Random) -> Numbers:
    a, more, years = rng.randint(6, 40), rng.randint(2, 30), rng.randint(2, 20)
    return {"a": a, "more": more, "years": years, "now": a + more, "answer": a + more + years}


def times_as_many(rng: Random) -> Numbers:
    a, times = rng.randint(4, 60), rng.randint(2, 9)
    return {"a": a, "times": times, "product": a * times, "answer": a + a * times}


def percent(rng: Random) -> Numbers:
    percent, hundreds = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), rng.randint(1, 9)
    part = percent * hundreds
    return {"whole": hundreds * 100, "percent": percent, "part": part, "answer": hundreds * 100 - part}


def half(rng: Random) -> Numbers:
    half, c = rng.randint(6, 120), rng.randint(2, 60)
    return {"a": 2 * half, "half": half, "c": c, "answer": half + c}


def average(rng: Random) -> Numbers:
    answer, low, high = rng.randint(12, 80), rng.randint(1, 10), rng.randint(1, 10)
    a, b, c = answer - low, answer + low + high, answer - high
    return {"a": a, "b": b, "c": c, "sum": 3 * answer, "answer": answer}


def weeks(rng: Random) -> Numbers:
    per_day, weeks = rng.randint(3, 40), rng.randint(2, 8)
    return {"perday": per_day, "weeks": weeks, "days": 7 * weeks, "answer": 7 * weeks * per_day}


def saving(rng: Random) -> Numbers:
    weekly, answer, start = rng.randint(3, 30), rng.randint(3, 20), rng.randint(5, 90)
    return {
        "start": start,
        "weekly": weekly,
        "goal": start + weekly * answer,
        "missing": weekly * answer,
        "answer": answer,
    }


def rectangle(rng: Random) -> Numbers:
    long, wide = rng.randint(8, 60), rng.randint(3, 40)
    return {"long": long, "wide": wide, "half": long + wide, "answer": 2 * (long + wide)}


def area_left(rng: Random) -> Numbers:
    long, wide, pond = rng.randint(8, 40), rng.randint(4, 25), rng.randint(3, 30)
    return {"long": long, "wide": wide, "pond": pond, "area": long * wide, "answer": long * wide - pond}


def recipe(rng: Random) -> Numbers:
    people, each, guests = rng.randint(2, 8), rng.randint(2, 9), rng.randint(9, 40)
    return {"people": people, "total": people * each, "each": each, "guests": guests, "answer": guests * each}


def fill(rng: Random) -> Numbers:
    rate, minutes, start = rng.randint(3, 25), rng.randint(4, 40), rng.randint(5, 90)
    return {
        "rate": rate,
        "minutes": minutes,
        "start": start,
        "poured": rate * minutes,
        "answer": start + rate * minutes,
    }


def difference(rng: Random) -> Numbers:
    a, b, c = rng.randint(80, 400), rng.randint(10, 79), rng.randint(5, 60)
    return {"a": a, "b": b, "c": c, "sum": b + c, "answer": a - b - c}


def teams(rng: Random) -> Numbers:
    size, answer, absent = rng.randint(3, 11), rng.randint(3, 15), rng.randint(2, 12)
    return {"all": size * answer + absent, "absent": absent, "present": size * answer, "size": size, "answer": answer}


def profit(rng: Random) -> Numbers:
    count, buy, margin = rng.randint(5, 40), rng.randint(2, 15), rng.randint(1, 9)
    return {"n": count, "buy": buy, "sell": buy + margin, "margin": margin, "answer": count * margin}


def clock(rng: Random) -> Numbers:
    hour, minute, length = rng.randint(6, 19), rng.randint(0, 11) * 5, rng.randint(3, 46) * 5
    end = hour * 60 + minute + length
    return {"hour": hour, "minute": minute, "length": length, "begin": hour * 60 + minute, "answer": end}
