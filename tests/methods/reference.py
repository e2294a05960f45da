"""The comparisons' equations as plain loops over one image, one class, one pair at a time, in float64.

Written from the equations alone; nothing of the package is used.
"""

from __future__ import annotations

import math

import torch


def softmax(row):
    """One row of logits (K,) as a list of probabilities."""
    exps = [torch.exp(s) for s in row]
    return [e / sum(exps) for e in exps]


def mean(terms):
    return sum(terms) / len(terms)


def cross_entropy(logits, labels):
    return mean([-torch.log(softmax(row)[y]) for row, y in zip(logits, labels, strict=True)])


def effective_number(count, beta):
    return sum(beta**j for j in range(count))


def balanced_weights(counts, beta):
    inverse = [1 / effective_number(int(n), beta) for n in counts]
    return [len(inverse) * w / sum(inverse) for w in inverse]


def focal(logits, labels, gamma, weights):
    terms = []
    for row, y in zip(logits, labels, strict=True):
        p = softmax(row)[y]
        terms.append(-weights[y] * (1 - p) ** gamma * torch.log(p))
    return mean(terms)


def adjusted(logits, labels, counts, tau):
    total = float(counts.sum())
    rows = [[s + tau * math.log(n / total) for s, n in zip(row, counts.tolist(), strict=True)] for row in logits]
    return cross_entropy(rows, labels)


def ldam(cosines, labels, counts, largest, scale, weights=None):
    smallest = min(counts.tolist())
    margins = [largest * (smallest / n) ** 0.25 for n in counts.tolist()]
    terms, shares = [], []
    for row, y in zip(cosines, labels, strict=True):
        moved = [scale * (z - margins[k] if k == y else z) for k, z in enumerate(row)]
        share = 1.0 if weights is None else weights[y]
        terms.append(-share * torch.log(softmax(moved)[y]))
        shares.append(share)
    return sum(terms) / sum(shares)


def lader(logits, labels, counts, regularization):
    prior = [n / float(counts.sum()) for n in counts.tolist()]
    classes, total = len(prior), 0.0
    for k in range(classes):
        own = [row[k] for row, y in zip(logits, labels, strict=True) if y == k]
        first = mean(own) if own else 0.0
        second = torch.log(mean([(1 / classes) / prior[k] * torch.exp(row[k]) for row in logits]))
        total = total + prior[k] * (-first + second + regularization * second**2)
    return total


def smoothed(logits, labels, eps):
    terms = []
    for row, y in zip(logits, labels, strict=True):
        p = softmax(row)
        target = [(1 - eps[y]) * (k == y) + eps[y] / len(p) for k in range(len(p))]
        terms.append(-sum(t * torch.log(q) for t, q in zip(target, p, strict=True)))
    return mean(terms)


def diversity(experts, temperature):
    total = 0.0
    for own in experts:
        for i in range(len(own)):
            average = mean([expert[i] for expert in experts])
            p = softmax([s / t for s, t in zip(average, temperature, strict=True)])
            q = softmax([s / t for s, t in zip(own[i], temperature, strict=True)])
            total = total + sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True)) / len(own)
    return mean(temperature) ** 2 * total


def distilled(logits, teacher, tau, power):
    """tau^2 KL of the teacher's softened, raised and again normalised predictions to the student's."""
    terms = []
    for own, other in zip(logits, teacher, strict=True):
        raised = [p**power for p in softmax(other / tau)]
        q = softmax(own / tau)
        terms.append(sum(p / sum(raised) * torch.log(p / sum(raised) / b) for p, b in zip(raised, q, strict=True)))
    return tau**2 * mean(terms)


def contrast(queries, positives, negatives, tau):
    """InfoNCE with one positive key for each query and the same negatives for all."""
    terms = []
    for q, k in zip(queries, positives, strict=True):
        bottom = torch.exp(q @ k / tau) + sum(torch.exp(q @ n / tau) for n in negatives)
        terms.append(-torch.log(torch.exp(q @ k / tau) / bottom))
    return mean(terms)


def paco(centres, queries, labels, keys, key_labels, own, tau, alpha, smoothing):
    """own[i]: the key that is query i itself, or None."""
    terms = []
    for i, (row, q, y) in enumerate(zip(centres, queries, labels, strict=True)):
        others = [(k, c) for j, (k, c) in enumerate(zip(keys, key_labels, strict=True)) if j != own[i]]
        bottom = sum(torch.exp(s) for s in row) + sum(torch.exp(q @ k / tau) for k, _ in others)
        top, weight = 0.0, 0.0
        for j, s in enumerate(row):
            share = 1 - smoothing if j == y else smoothing / (len(row) - 1)
            top, weight = top + share * torch.log(torch.exp(s) / bottom), weight + share
        for k, c in others:
            if c == y:
                top, weight = top + alpha * torch.log(torch.exp(q @ k / tau) / bottom), weight + alpha
        terms.append(-top / weight)
    return mean(terms)


def prototypes(embeddings, labels, vectors, tau):
    terms = []
    for z, y in zip(embeddings, labels, strict=True):
        others = sum(torch.exp(z @ p / tau) for j, p in enumerate(vectors) if j != y)
        terms.append(-torch.log(torch.exp(z @ vectors[y] / tau) / others))
    return mean(terms)


def robust(features, labels, centroids, epsilon, tau):
    """centroids: {class: vector}, of the classes that have one."""
    terms = []
    for c, mu in centroids.items():
        own = [i for i, y in enumerate(labels) if y == c]
        if not own:
            continue
        scores = [
            torch.exp(-((mu - z).norm() + (epsilon[c] if y == c else 0)) / tau)
            for z, y in zip(features, labels, strict=True)
        ]
        terms.append(mean([-torch.log(scores[i] / sum(scores)) for i in own]))
    return mean(terms) if terms else torch.zeros(())
