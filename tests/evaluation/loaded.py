"""A data set of one question, loaded."""

from codebook.cli.data import load_data


def one(kind, folder):
    [task] = load_data([f"{kind}:{folder}"])
    [sample] = task.samples
    return task, sample
