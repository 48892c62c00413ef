"""The slow and obvious versions that the fast code is compared with."""

from __future__ import annotations

import itertools
import json
import math
import struct


def average_precision_in_order(relevant, top=None):
    """Average precision of one fixed order, divided by the relevant items found within the first `top`."""
    found, total = 0, 0.0
    for place, is_relevant in enumerate(relevant[:top], start=1):
        if is_relevant:
            found += 1
            total += found / place
    return total / found if found else 0.0


def average_precision_over_permutations(distances, relevant, top=None):
    """Mean over every order of the items that keeps the distances ascending."""
    groups = [
        [is_relevant for distance, is_relevant in zip(distances, relevant, strict=True) if distance == wanted]
        for wanted in sorted(set(distances))
    ]
    orders = itertools.product(*(list(itertools.permutations(group)) for group in groups))
    scores = [average_precision_in_order([flag for group in order for flag in group], top) for order in orders]
    return sum(scores) / len(scores)


def snap_in_loops(grad, y, books, config):
    """Bend gradients row by row and block by block, by the formulas of `gsl_dist.snap`; lists of the same nesting.

    Gives the bent gradients, whether each block was aligned, and the pull d of each (None where none was aligned).
    """
    pulls = [
        [_choose_pull(g, x, book, config) for g, x, book in zip(*row, books, strict=True)]
        for row in zip(grad, y, strict=True)
    ]
    projections = [
        [[0.0] * len(g) if d is None else _project(g, d) for g, d in zip(*row, strict=True)]
        for row in zip(grad, pulls, strict=True)
    ]
    total, kept = _length(_flatten(grad)), _length(_flatten(projections))
    scale = total / kept if kept else 0.0
    bent = [
        [
            _fall_back(g, x, book, config.fallback) if d is None else _bend_block(g, d, scale, config)
            for g, x, d, book in zip(*row, books, strict=True)
        ]
        for row in zip(grad, y, pulls, strict=True)
    ]
    return bent, [[d is not None for d in row] for row in pulls], pulls


def spring_in_loops(grad, y, books, config, rows):
    """Give the gradients that springs leave, by the formulas of `gsl_dist.snap`; lists of the same nesting."""

    def block(g, x, book):
        away = _choose_pull(g, x, book, config)
        if away is not None:
            away = [-a for a in away]
        else:
            away = min(([a - c for c, a in zip(word, x, strict=True)] for word in book), key=_length)
            if _dot(away, g) < 0:
                away = [a - b for a, b in zip(away, _project(away, g), strict=True)]
        return [a + 2 * config.weight / rows * b for a, b in zip(g, away, strict=True)]

    return [[block(*part) for part in zip(*row, books, strict=True)] for row in zip(grad, y, strict=True)]


def _choose_pull(g, x, book, config):
    pulls = sorted(([c - a for c, a in zip(word, x, strict=True)] for word in book), key=_length)
    ranges = [pulls[: config.neighbours]] + [pulls] * (config.fallback == "widen")
    for candidates in ranges:
        cosines = [(-_dot(g, d) / (_length(g) * _length(d)), d) for d in candidates if _length(d) and _length(g)]
        best, pull = max(cosines, key=lambda pair: pair[0], default=(0.0, None))
        if best > 0:
            return pull
    return None


def _bend_block(g, d, scale, config):
    projection = _project(g, d)
    pull = [-_length(g) * a / _length(d) for a in d]
    if config.variant == "norm":
        return pull
    if config.variant == "clamp":
        longest = _length(d) / config.step
        return [a * min(1.0, longest / _length(projection)) for a in projection]
    if config.variant == "rescale":
        return [a * scale for a in projection]
    if config.variant == "blend":
        return [(1 - config.beta) * a + config.beta * b for a, b in zip(g, projection, strict=True)]
    if config.variant == "add":
        return [a + config.beta * b for a, b in zip(g, pull, strict=True)]
    return projection


def _fall_back(g, x, book, fallback):
    if fallback == "pass":
        return list(g)
    if fallback != "orthogonal":
        return [0.0] * len(g)
    nearest = min(([a - c for c, a in zip(word, x, strict=True)] for word in book), key=_length)
    part = _project(g, nearest) if _length(nearest) else [0.0] * len(g)
    return [a - b for a, b in zip(g, part, strict=True)]


def _project(g, d):
    return [_dot(g, d) / _dot(d, d) * a for a in d]


def _dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def _length(a):
    return math.sqrt(_dot(a, a))


def _flatten(nested):
    return [value for row in nested for block in row for value in block]


def lloyd_in_loops(x, centroids):
    """One step of Lloyd for one group: new centroids (None for one that won no row), labels, squared distances."""
    labels, distances = [], []
    for row in x:
        reach = [sum((a - b) ** 2 for a, b in zip(row, centroid, strict=True)) for centroid in centroids]
        distances.append(min(reach))
        labels.append(reach.index(distances[-1]))
    moved = []
    for word in range(len(centroids)):
        won = [row for row, label in zip(x, labels, strict=True) if label == word]
        moved.append([sum(column) / len(won) for column in zip(*won, strict=True)] if won else None)
    return moved, labels, distances


def triplet_in_loops(y, labels, margin, mining="hardest"):
    """All or batch-hard triplets on rows of length 1, distances not squared; the mean over the terms above 0."""
    y, terms = [_scale_to_one(row) for row in y], []
    for a, label in enumerate(labels):
        near = [math.dist(y[a], y[i]) for i, other in enumerate(labels) if other == label and i != a]
        far = [math.dist(y[a], y[i]) for i, other in enumerate(labels) if other != label]
        if mining == "all":
            terms += [positive - negative + margin for positive in near for negative in far]
        elif near and far:
            terms.append(max(near) - min(far) + margin)
    return _mean_above_zero(terms)


def pairwise_in_loops(y, labels, margin):
    """Contrastive pairs on rows of length 1, distances not squared; each mean is over the terms above 0."""
    y, near, far = [_scale_to_one(row) for row in y], [], []
    for a, b in itertools.permutations(range(len(labels)), 2):
        distance = math.dist(y[a], y[b])
        (near if labels[a] == labels[b] else far).append(distance if labels[a] == labels[b] else margin - distance)
    return _mean_above_zero(near) + _mean_above_zero(far)


def proxy_in_loops(y, labels, proxies, temperature):
    """Cross-entropy of the cosines to the proxies over the temperature; the mean over all rows."""
    y, proxies, total = [_scale_to_one(row) for row in y], [_scale_to_one(proxy) for proxy in proxies], 0.0
    for row, label in zip(y, labels, strict=True):
        scores = [_dot(row, proxy) / temperature for proxy in proxies]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    return total / len(labels)


def _scale_to_one(row):
    return [a / _length(row) for a in row]


def _mean_above_zero(terms):
    terms = [term for term in terms if term > 0]
    return sum(terms) / len(terms) if terms else 0.0


def pack_bit_by_bit(codes, bits):
    """Write the choices of each row one after another, lowest bit first, into as few bytes as hold them."""
    rows = []
    for row in codes:
        packed = bytearray((len(row) * bits + 7) // 8)
        for place, choice in enumerate(row):
            for bit in range(bits):
                if int(choice) >> bit & 1:
                    at = place * bits + bit
                    packed[at // 8] |= 1 << at % 8
        rows.append(list(packed))
    return rows


def decode_in_loops(cells, codes, coarse, books, residual, *, additive=False, rotation=None):
    """The vectors that codes stand for, number by number; with a rotation R, z stands for the x with z = R x."""
    vectors = []
    for cell, row in zip(cells, codes, strict=True):
        words = [[float(number) for number in book[choice]] for book, choice in zip(books, row, strict=True)]
        vector = (
            [sum(column) for column in zip(*words, strict=True)] if additive else [a for word in words for a in word]
        )
        vector = [x + float(c) for x, c in zip(vector, coarse[cell], strict=True)] if residual else vector
        if rotation is not None:
            vector = [_dot(column, vector) for column in zip(*rotation, strict=True)]
        vectors.append(vector)
    return vectors


def beam_in_loops(row, books, width):
    """The best sums that a beam finds, nearest first: pairs of a code and what it leaves over."""
    kept = [((), row)]
    for book in books:
        tried = [
            ((*code, word), [a - c for a, c in zip(rest, numbers, strict=True)])
            for code, rest in kept
            for word, numbers in enumerate(book)
        ]
        kept = sorted(tried, key=lambda pair: _dot(pair[1], pair[1]))[:width]
    return kept


def sum_exhaustively(row, books):
    """All sums of one codeword of each book, nearest first: pairs of a code and what it leaves over."""
    found = []
    for code in itertools.product(*(range(len(book)) for book in books)):
        words = [book[word] for book, word in zip(books, code, strict=True)]
        found.append((code, [a - sum(column) for a, column in zip(row, zip(*words, strict=True), strict=True)]))
    return sorted(found, key=lambda pair: _dot(pair[1], pair[1]))


def descend_in_loops(row, code, books, sweeps):
    """Choose again in every book with the others fixed, sweep after sweep."""
    code = list(code)
    for _ in range(sweeps):
        for place, book in enumerate(books):
            others = [books[m][word] for m, word in enumerate(code) if m != place]
            rest = [a - sum(column) for a, column in zip(row, zip(*others, strict=True), strict=True)]
            reach = [math.dist(rest, numbers) for numbers in book]
            code[place] = reach.index(min(reach))
    return code


def count_choices(rows, codes, books, words):
    """How often each two codewords were chosen for one row, and the sum of the rows of each codeword."""
    met = [[0] * (books * words) for _ in range(books * words)]
    sums = [[0.0] * len(rows[0]) for _ in range(books * words)]
    for row, code in zip(rows, codes, strict=True):
        places = [book * words + word for book, word in enumerate(code)]
        for one, other in itertools.product(places, places):
            met[one][other] += 1
        for place in places:
            sums[place] = [a + b for a, b in zip(sums[place], row, strict=True)]
    return met, sums


def deal_in_loops(variances, parts):
    """Deal variances, largest first, each to the part whose product is least; those dealt to each part."""
    dealt = [[] for _ in range(parts)]
    for variance in sorted(variances, reverse=True):
        open_parts = [part for part in dealt if len(part) < len(variances) // parts]
        min(open_parts, key=lambda part: math.prod(v / min(variances) for v in part)).append(variance)
    return dealt


def merge_by_sorting(answers, k):
    """For each query, all (distance, id) pairs of all answers, sorted; absent ones (id -1) last."""
    merged = []
    for query in range(len(answers[0].ids)):
        found = [
            (float(distance), int(hit))
            for answer in answers
            for hit, distance in zip(answer.ids[query], answer.distances[query], strict=True)
            if hit != -1
        ]
        merged.append(sorted(found)[:k])
    return merged


def search_in_loops(queries, ids, vectors, k):
    """For each query, the k nearest (squared distance, id) pairs among all vectors."""
    rows = []
    for query in queries:
        lengths = [sum((float(a) - float(b)) ** 2 for a, b in zip(query, x, strict=True)) for x in vectors]
        rows.append(sorted(zip(lengths, map(int, ids), strict=True))[:k])
    return rows


def place_in_loops(row, cell, coarse, edges, levels):
    """Give the place of a row's edge among those of its cell, its level, and what its point on the line leaves over."""

    def squared(one, other):
        return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))

    def point(along, end):
        return [a + along * (b - a) for a, b in zip(coarse[cell], coarse[end], strict=True)]

    best = None
    for place, end in enumerate(edges[cell]):
        steps = [(a - c) * (b - c) for a, b, c in zip(row, coarse[end], coarse[cell], strict=True)]
        length = squared(coarse[end], coarse[cell])
        along = min(1.0, max(0.0, sum(steps) / length)) if length else 0.0
        reach = squared(row, point(along, end))
        if best is None or reach < best[0]:
            best = (reach, place, along, end)
    _, place, along, end = best
    level = min(range(len(levels)), key=lambda number: abs(levels[number] - along))
    return place, level, [a - b for a, b in zip(row, point(levels[level], end), strict=True)]


def rabitq_in_loops(query, row, centroid, words):
    """Estimate the squared distance of a query to a row coded by `words`, and give the signs the row should have."""
    rest = [number - middle for number, middle in zip(row, centroid, strict=True)]
    asked = [number - middle for number, middle in zip(query, centroid, strict=True)]
    scale = _dot(rest, rest) / _dot(words, rest)
    estimate = _dot(asked, asked) + _dot(rest, rest) - 2 * scale * _dot(asked, words)
    return estimate, [number > 0 for number in rest]


def deal_cells_in_loops(sizes, shards):
    """Deal cells out, the longest first, each to the shard with the fewest rows, then the fewest cells."""
    dealt, rows, cells = [0] * len(sizes), [0] * shards, [0] * shards
    for cell in sorted(range(len(sizes)), key=lambda cell: (-sizes[cell], cell)):
        shard = min(range(shards), key=lambda shard: (rows[shard], cells[shard], shard))
        dealt[cell], rows[shard], cells[shard] = shard, rows[shard] + sizes[cell], cells[shard] + 1
    return dealt


def search_regions_in_loops(query, codebook, rows, k, probes, cells):
    """The k nearest (squared distance, id) pairs among rows in the first regions of the nearest cells.

    Rows are triples of an id, a region and the vector that the code stands for; nothing is rotated.
    """

    def squared(one, other):
        return sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True))

    nearest = sorted((squared(query, centroid), cell) for cell, centroid in enumerate(codebook.coarse))[:cells]
    ranked = []
    for _, cell in nearest:
        for edge, (end, foot) in enumerate(zip(codebook.edges[cell], codebook.feet[cell], strict=True)):
            ends = zip(codebook.coarse[cell], codebook.coarse[end], strict=True)
            point = [float(a) + float(foot) * (float(b) - float(a)) for a, b in ends]
            ranked.append((squared(query, point), cell * len(codebook.edges[cell]) + edge))
    looked = {region for _, region in sorted(ranked)[:probes]}
    return sorted((squared(query, vector), item) for item, region, vector in rows if region in looked)[:k]


def connect_in_loops(pairs):
    """Give each id of some pairs the smallest id that it is connected with, by walking."""
    near = {}
    for one, other in pairs:
        near.setdefault(one, set()).add(other)
        near.setdefault(other, set()).add(one)
    groups = {}
    for start in sorted(near):
        met = [] if start in groups else [start]
        while met:
            item = met.pop()
            groups[item] = start
            met += [other for other in near[item] if other not in groups]
    return groups


def quantize_in_loops(filters, kind, bits):
    """Give the low-bit weights of a layer, a list of filters, by the formulas of `gsl_dist.encoders.packed`."""
    weights = _flatten([filters])
    if kind == "power":
        largest = max(abs(w) for w in weights)
        top = math.floor(math.log2(4 * largest / 3))
        sizes = [2.0**n for n in range(top - 2 ** (bits - 2) + 1, top + 1)]
        return [[_land(w, [0.0, *sizes]) for w in row] for row in filters]
    mean = sum(weights) / len(weights)
    edge = -1.0 if kind == "binary" else 0.7 * sum(abs(w - mean) for w in weights) / len(weights)
    quantized = []
    for row in filters:
        beyond = [abs(w) for w in row if abs(w) > edge]
        scale = sum(beyond) / len(beyond) if beyond else 0.0
        quantized.append([0.0 if abs(w) <= edge else scale if w >= 0 else -scale for w in row])
    return quantized


def _land(w, sizes):
    # The larger of two that are as near.
    nearest = min(sizes, key=lambda size: (abs(abs(w) - size), -size))
    return nearest if w > 0 else -nearest


def draw_in_turn(chances, count):
    """Give the chance of each unit to be among `count` drawn one by one without replacement, by walking every order."""
    included = [0.0] * len(chances)

    def walk(drawn, probability):
        if len(drawn) == count:
            for unit in drawn:
                included[unit] += probability
            return
        left = [unit for unit in range(len(chances)) if unit not in drawn]
        total = sum(chances[unit] for unit in left)
        for unit in left:
            walk((*drawn, unit), probability * chances[unit] / total)

    walk((), 1.0)
    return included


def read_packed_in_loops(content):
    """Read a file of low-bit weights bit by bit, from its bytes and its header alone: name -> numbers, flat."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    layers = json.loads(header.pop("__metadata__")["gsl_packed"])["layers"]

    def take(name):
        start, stop = header[name]["data_offsets"]
        return body[start:stop]

    weights = {}
    for name, entry in layers.items():
        stream = [byte >> bit & 1 for byte in take(f"{name}.codes") for bit in range(8)]
        size = math.prod(entry["shape"]) // entry["shape"][0]
        scales = [2.0 ** entry["top"]] * entry["shape"][0] if "top" in entry else _floats(take(f"{name}.scales"))
        found = []
        for place in range(math.prod(entry["shape"])):
            bits = stream[place * entry["bits"] : (place + 1) * entry["bits"]]
            code = sum(bit << at for at, bit in enumerate(bits))
            if entry["kind"] == "power":
                level = 0.0 if code == 0 else (-1.0) ** (code - 1) * 2.0 ** -((code - 1) // 2)
            else:
                level = {"binary": (-1.0, 1.0), "ternary": (0.0, 1.0, -1.0)}[entry["kind"]][code]
            found.append(level * scales[place // size])
        weights[name] = found
    return weights


def _floats(content):
    return list(struct.unpack(f"<{len(content) // 4}f", content))
