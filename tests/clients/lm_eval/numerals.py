"""Questions for lm-eval out of examples/numerals/heldout.jsonl, from all over the file."""

QUESTIONS = 24


def some(dataset):
    """A few of the questions."""
    return dataset.select(_places(dataset))


def choices(dataset):
    """The same with four answers to choose from: the right one, and those of the numbers that come next in the file."""

    def add(doc, index):
        place = _places(dataset)[index]
        answers = [dataset[(place + shift) % len(dataset)]["answer"] for shift in range(4)]
        label = index % 4
        answers[0], answers[label] = answers[label], answers[0]
        return {"choices": answers, "label": label}

    return some(dataset).map(add, with_indices=True)


def _places(dataset):
    return range(0, len(dataset), len(dataset) // QUESTIONS)[:QUESTIONS]
