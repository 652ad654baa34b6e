"""Wrong solutions of the course, one per usual mistake, each with the words by which its check has to name it."""

import math

import torch
from course_solutions import (
    attention,
    causal_mask,
    embeddings,
    masked_attention,
    padding_mask,
    positional_encoding,
    residual,
)
from torch import nn

from dataset import EOS, PAD, SOS

MISTAKES: dict[str, tuple] = {}  # name of the mistake -> (name of the function, wrong function, words of the message)


def mistake(name: str, words: str):
    """Registers a wrong version of the function `name`."""

    def register(function):
        MISTAKES[function.__name__] = (name, function, words)
        return function

    return register


# ---------------------------------------------------------------------------- steps 1 and 2


@mistake("embeddings", "not multiplied by sqrt(d_model): their standard deviation is 1.02, not 4.09")
def embeddings_unscaled(ids, weight):
    return weight[ids]


@mistake("embeddings", "multiplied by d_model instead of sqrt(d_model)")
def embeddings_times_d(ids, weight):
    return weight[ids] * weight.size(1)


@mistake("embeddings", "has the shape (2, 16), not (2, 40, 16)")
def embeddings_of_first_token(ids, weight):
    return weight[ids[:, 0]] * math.sqrt(weight.size(1))


def encoding(seq_len, d_model, base=10_000, first=0):
    angle = (torch.arange(seq_len) + first).unsqueeze(1) / base ** (torch.arange(0, d_model, 2) / d_model)
    return angle.sin(), angle.cos()


@mistake("positional_encoding", "sine and cosine are swapped: row 0 starts with 1, 0, not 0, 1")
def positions_swapped(seq_len, d_model):
    sine, cosine = encoding(seq_len, d_model)
    return torch.stack([cosine, sine], -1).flatten(1)


@mistake("positional_encoding", "the base is 1,000 instead of 10,000")
def positions_base(seq_len, d_model):
    return torch.stack(encoding(seq_len, d_model, base=1_000), -1).flatten(1)


@mistake("positional_encoding", "they have to alternate")
def positions_concatenated(seq_len, d_model):
    return torch.cat(encoding(seq_len, d_model), -1)


@mistake("positional_encoding", "counted from 1 instead of 0")
def positions_from_one(seq_len, d_model):
    return torch.stack(encoding(seq_len, d_model, first=1), -1).flatten(1)


@mistake("positional_encoding", "the exponent is i / D instead of 2i / D")
def positions_half_exponent(seq_len, d_model):
    angle = torch.arange(seq_len).unsqueeze(1) / 10_000 ** (torch.arange(d_model // 2) / d_model)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def encodings_for(ids, weight):
    return positional_encoding(ids.size(1), weight.size(1))


@mistake("embed", "added before the embeddings are multiplied by sqrt(d_model)")
def embed_positions_before_scale(ids, weight, dropout):
    return dropout((weight[ids] + encodings_for(ids, weight)) * math.sqrt(weight.size(1)))


@mistake("embed", "added after dropout, so they are never dropped")
def embed_positions_after_dropout(ids, weight, dropout):
    return dropout(embeddings(ids, weight)) + encodings_for(ids, weight)


@mistake("embed", "the positions are not added")
def embed_without_positions(ids, weight, dropout):
    return dropout(embeddings(ids, weight))


# ---------------------------------------------------------------------------- steps 3 and 4


@mistake("layer_norm", "the variance is the unbiased one, divided by D - 1 instead of D")
def norm_unbiased(x, gain, bias, eps=1e-5):
    return gain * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() + bias


@mistake("layer_norm", "unbiased one, divided by D - 1")
def norm_unbiased_std(x, gain, bias, eps=1e-5):
    return gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) + bias


@mistake("layer_norm", "over the positions (dimension 1)")
def norm_over_positions(x, gain, bias, eps=1e-5):
    return gain * (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + eps).sqrt() + bias


@mistake("layer_norm", "eps is missing: a vector of equal numbers")
def norm_without_eps(x, gain, bias, eps=1e-5):
    return gain * (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) + bias


@mistake("layer_norm", "eps is added to the standard deviation")
def norm_eps_outside(x, gain, bias, eps=1e-5):
    return gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + eps) + bias


@mistake("layer_norm", "the mean is not subtracted")
def norm_without_mean(x, gain, bias, eps=1e-5):
    return gain * x / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() + bias


@mistake("layer_norm", "gain and bias are not applied")
def norm_without_gain(x, gain, bias, eps=1e-5):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


@mistake("feed_forward", "the ReLU is missing")
def feed_forward_linear(x, linear_1, linear_2):
    return linear_2(linear_1(x))


@mistake("feed_forward", "the ReLU comes after the second layer")
def feed_forward_late_relu(x, linear_1, linear_2):
    return torch.relu(linear_2(linear_1(x)))


# ---------------------------------------------------------------------------- steps 5 to 7


def attend(query, key, value, scale=1.0, dim=-1):
    scores = (query @ key.transpose(-2, -1) * scale).softmax(dim)
    return scores @ value, scores


@mistake("attention", "scores are not divided by sqrt(d_k): their variance is 16.0, not 1")
def attention_unscaled(query, key, value):
    return attend(query, key, value)


@mistake("attention", "scores are divided by d_k instead of sqrt(d_k): their variance is 0.1, not 1")
def attention_by_d_k(query, key, value):
    return attend(query, key, value, 1 / query.size(-1))


@mistake("attention", "the softmax is over the queries (dimension -2)")
def attention_over_queries(query, key, value):
    return attend(query, key, value, 1 / math.sqrt(query.size(-1)), dim=-2)


@mistake("attention", "the division by sqrt(d_k) comes after the softmax: row 0 sums to 0.25")
def attention_scaled_late(query, key, value):
    context, scores = attend(query, key, value)
    return context / math.sqrt(query.size(-1)), scores / math.sqrt(query.size(-1))


@mistake("attention", "return the pair (context, scores)")
def attention_without_scores(query, key, value):
    return attention(query, key, value)[0]


@mistake("padding_mask", "the padding mask is inverted")
def padding_inverted(ids):
    return ~padding_mask(ids)


@mistake("padding_mask", "[PAD] has the id 1")
def padding_zero(ids):
    return (ids != 0)[:, None, None, :]


@mistake("padding_mask", "has the shape (2, 5), not (2, 1, 1, 5)")
def padding_shape(ids):
    return ids != PAD


@mistake("causal_mask", "inverted; row 2 sees position 3: the mask lets the future in")
def causal_inverted(size):
    return torch.ones(1, size, size, dtype=torch.bool).triu(1)


@mistake("causal_mask", "row 2 sees position 3: the mask lets the future in")
def causal_open(size):
    return torch.ones(1, size, size, dtype=torch.bool)


@mistake("causal_mask", "the diagonal is missing: row 3 does not see its own position")
def causal_without_diagonal(size):
    return torch.ones(1, size, size, dtype=torch.bool).tril(-1)


@mistake("causal_mask", "give booleans, True = may attend")
def causal_of_integers(size):
    return torch.ones(1, size, size).tril()


def raw(query, key):
    return query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))


@mistake("masked_attention", "the mask is applied after the softmax: row 0 sums to")
def mask_after_softmax(query, key, value, mask):
    scores = raw(query, key).softmax(-1) * mask
    return scores @ value, scores


@mistake("masked_attention", "the mask is inverted")
def mask_inverted(query, key, value, mask):
    return masked_attention(query, key, value, ~mask)


@mistake("masked_attention", "set to 0 instead of -infinity")
def mask_zero(query, key, value, mask):
    scores = raw(query, key).masked_fill(~mask, 0).softmax(-1)
    return scores @ value, scores


@mistake("masked_attention", "the mask is not applied")
def mask_ignored(query, key, value, mask):
    return attention(query, key, value)


def heads(q, k, v, mask, w_q, w_k, w_v, w_o, h, right_split=True):
    def split(x):
        if right_split:
            return x.unflatten(-1, (h, -1)).transpose(1, 2)
        return x.view(x.size(0), h, x.size(1), -1)

    context, scores = masked_attention(split(w_q(q)), split(w_k(k)), split(w_v(v)), mask)
    return w_o(context.transpose(1, 2).flatten(2)), scores


@mistake("multi_head_attention", "heads are split without the transpose, which mixes up positions and heads")
def heads_mixed_up(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    return heads(q, k, v, mask, w_q, w_k, w_v, w_o, h, right_split=False)


@mistake("multi_head_attention", "w_o is missing")
def heads_without_w_o(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    return heads(q, k, v, mask, w_q, w_k, w_v, nn.Identity(), h)


@mistake("multi_head_attention", "one head of 16 dimensions instead of 4 of 4")
def heads_single(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    return heads(q, k, v, mask, w_q, w_k, w_v, w_o, 1)


@mistake("multi_head_attention", "the mask is not passed on")
def heads_without_mask(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    return heads(q, k, v, torch.ones_like(mask), w_q, w_k, w_v, w_o, h)


@mistake("multi_head_attention", "joined without the transpose back")
def heads_joined_wrongly(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    def split(x):
        return x.unflatten(-1, (h, -1)).transpose(1, 2)

    context, scores = masked_attention(split(w_q(q)), split(w_k(k)), split(w_v(v)), mask)
    return w_o(context.reshape(q.shape)), scores


# ---------------------------------------------------------------------------- steps 8 to 10


@mistake("residual", "the residual is missing")
def residual_missing(x, sublayer, norm, dropout):
    return dropout(sublayer(norm(x)))


@mistake("residual", "the norm is on the wrong side (post-norm)")
def residual_post_norm(x, sublayer, norm, dropout):
    return norm(x + dropout(sublayer(x)))


@mistake("residual", "norm(x) is added instead of x")
def residual_of_norm(x, sublayer, norm, dropout):
    x = norm(x)
    return x + dropout(sublayer(x))


@mistake("residual", "dropout is applied to the sum")
def residual_dropout_of_sum(x, sublayer, norm, dropout):
    return dropout(residual(x, sublayer, norm, nn.Identity()))


@mistake("encoder_block", "src_mask is not passed to the attention")
def encoder_without_mask(x, src_mask, block):
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, None))
    return block.residual_connections[1](x, block.feed_forward_block)


@mistake("encoder_block", "the feed-forward sublayer is missing")
def encoder_without_feed_forward(x, src_mask, block):
    return block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, src_mask))


@mistake("encoder", "the final norm is missing")
def encoder_without_norm(x, src_mask, layers, norm):
    for layer in layers:
        x = layer(x, src_mask)
    return x


@mistake("encoder", "every layer gets the input of the first")
def encoder_not_chained(x, src_mask, layers, norm):
    for layer in layers:
        y = layer(x, src_mask)
    return norm(y)


def decode(x, block, cross, self_mask):
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, self_mask))
    x = block.residual_connections[1](x, cross)
    return block.residual_connections[2](x, block.feed_forward_block)


@mistake("decoder_block", "cross-attention takes keys and values from the decoder")
def cross_keys_of_decoder(x, encoder_output, src_mask, tgt_mask, block):
    return decode(x, block, lambda x: block.cross_attention_block(x, x, x, tgt_mask), tgt_mask)


@mistake("decoder_block", "src_mask is not applied in cross-attention: changing a [PAD] of the source")
def cross_without_mask(x, encoder_output, src_mask, tgt_mask, block):
    def cross(x):
        return block.cross_attention_block(x, encoder_output, encoder_output, None)

    return decode(x, block, cross, tgt_mask)


@mistake("decoder_block", "tgt_mask is not applied in self-attention: position 1 changes by")
def decoder_without_mask(x, encoder_output, src_mask, tgt_mask, block):
    def cross(x):
        return block.cross_attention_block(x, encoder_output, encoder_output, src_mask)

    return decode(x, block, cross, None)


@mistake("decoder", "the final norm is missing")
def decoder_without_norm(x, encoder_output, src_mask, tgt_mask, layers, norm):
    for layer in layers:
        x = layer(x, encoder_output, src_mask, tgt_mask)
    return x


# ---------------------------------------------------------------------------- step 11


@mistake("project", "a softmax is applied")
def project_softmax(x, weight, bias):
    return (x @ weight.T + bias).softmax(-1)


@mistake("shift_labels", "labels are not shifted")
def labels_not_shifted(target):
    return target[:, :-1], target[:, :-1]


@mistake("shift_labels", "labels are shifted by two positions instead of one (off by one)")
def labels_off_by_one(target):
    return target[:, :-2], target[:, 2:]


def token_losses(logits, label, smoothing):
    log_p = logits.log_softmax(-1)
    of_label = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return -(1 - smoothing) * of_label - smoothing * log_p.mean(-1)


@mistake("smoothed_loss", "padding is counted in the loss")
def loss_with_padding(logits, label, smoothing):
    return token_losses(logits, label, smoothing).mean()


@mistake("smoothed_loss", "the mean of the sentences' means")
def loss_by_sentence(logits, label, smoothing):
    is_token = label != PAD
    return ((token_losses(logits, label, smoothing) * is_token).sum(1) / is_token.sum(1)).mean()


@mistake("smoothed_loss", "divided by the number of sentences instead of target tokens")
def loss_by_batch(logits, label, smoothing):
    return (token_losses(logits, label, smoothing) * (label != PAD)).sum() / len(label)


@mistake("smoothed_loss", "the smoothing mass is wrong: the target distribution has 0.9 on the label")
def loss_smoothing_mass(logits, label, smoothing):
    log_p = logits.log_softmax(-1)
    of_label = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    others = (log_p.sum(-1) - of_label) / (logits.size(-1) - 1)
    is_token = label != PAD
    return -((1 - smoothing) * of_label + smoothing * others)[is_token].mean()


@mistake("smoothed_loss", "label smoothing is missing")
def loss_without_smoothing(logits, label, smoothing):
    return token_losses(logits, label, 0.0)[label != PAD].mean()


# ---------------------------------------------------------------------------- step 12


@mistake("greedy_decode", "[EOS] is ignored")
def greedy_without_end(next_logits, max_length):
    ids = [SOS]
    for _ in range(max_length):
        ids.append(int(next_logits(ids).argmax()))
    return [i for i in ids if i not in (SOS, EOS)]


@mistake("greedy_decode", "[SOS] is missing: next_logits got []")
def greedy_without_start(next_logits, max_length):
    ids = []
    while len(ids) < max_length and EOS not in ids:
        ids.append(int(next_logits(ids).argmax()))
    return ids


@mistake("greedy_decode", "the length limit is ignored")
def greedy_without_limit(next_logits, max_length):
    ids = [SOS]
    while (token := int(next_logits(ids).argmax())) != EOS:
        ids.append(token)
    return ids[1:]


@mistake("greedy_decode", "which contains [EOS] (3)")
def greedy_with_end(next_logits, max_length):
    ids = [SOS]
    while len(ids) <= max_length and ids[-1] != EOS:
        ids.append(int(next_logits(ids).argmax()))
    return ids[1:]


def beam(next_logits, max_length, beam_size, normalizer, value=lambda x: x.log_softmax(-1), keep=lambda ids: True):
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, max_length + 1):
        extensions = [
            (p + m, [*ids, t]) for p, ids in hypotheses for t, m in enumerate(value(next_logits(ids)).tolist())
        ]
        extensions = sorted(extensions, reverse=True)[:beam_size]
        done = [(p, ids) for p, ids in extensions if ids[-1] == EOS or length == max_length]
        finished += [(p / normalizer(length), ids) for p, ids in done if keep(ids)]
        hypotheses = [(p, ids) for p, ids in extensions if (p, ids) not in done]
    return [t for t in max(finished)[1] if t not in (SOS, EOS)]


def penalized(length_penalty):
    return lambda length: ((5 + length) / 6) ** length_penalty


@mistake("beam_search", "logits are summed instead of log-probabilities: it returns")
def beam_sums_logits(next_logits, max_length, beam_size, length_penalty=0.6):
    return beam(next_logits, max_length, beam_size, penalized(length_penalty), value=lambda x: x)


@mistake("beam_search", "finished hypotheses are dropped")
def beam_drops_finished(next_logits, max_length, beam_size, length_penalty=0.6):
    normalizer = penalized(length_penalty)
    return beam(next_logits, max_length, beam_size, normalizer, keep=lambda ids: len(ids) > max_length)


@mistake("beam_search", "there is no length normalization")
def beam_without_normalization(next_logits, max_length, beam_size, length_penalty=0.6):
    return beam(next_logits, max_length, beam_size, lambda length: 1)


@mistake("beam_search", "the score is divided by the length instead of")
def beam_divides_by_length(next_logits, max_length, beam_size, length_penalty=0.6):
    return beam(next_logits, max_length, beam_size, lambda length: length)


@mistake("beam_search", "[EOS] is ignored: next_logits got")
def beam_extends_finished(next_logits, max_length, beam_size, length_penalty=0.6):
    hypotheses = [(0.0, [SOS])]
    for _ in range(max_length):
        hypotheses = [
            (p + m, [*ids, t]) for p, ids in hypotheses for t, m in enumerate(next_logits(ids).log_softmax(-1).tolist())
        ]
        hypotheses = sorted(hypotheses, reverse=True)[:beam_size]
    return [t for t in hypotheses[0][1] if t not in (SOS, EOS)]


@mistake("beam_search", "hypotheses or more; keep beam_size = ")
def beam_cut_per_hypothesis(next_logits, max_length, beam_size, length_penalty=0.6):
    """With beam_size = 1 this is greedy decoding."""
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, max_length + 1):
        extensions = []
        for p, ids in hypotheses:
            log_p = next_logits(ids).log_softmax(-1)
            more, tokens = log_p.topk(min(beam_size, len(log_p)))
            extensions += [(p + m, [*ids, t]) for m, t in zip(more.tolist(), tokens.tolist(), strict=True)]
        done = [h for h in extensions if h[1][-1] == EOS or length == max_length]
        finished += [(p / penalized(length_penalty)(length), ids) for p, ids in done]
        hypotheses = [h for h in extensions if h[1][-1] != EOS]
    return [t for t in max(finished)[1] if t not in (SOS, EOS)]


def flexible_beam(next_logits, max_length, beam_size, score, largest=True, cut_first=True, stay=False):
    """A beam search whose score gets the log-probability and the ids."""
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, max_length + 1):
        extensions = [(p, ids) for p, ids in hypotheses if ids[-1] == EOS]
        for p, ids in hypotheses:
            if ids[-1] != EOS:
                extensions += [(p + m, [*ids, t]) for t, m in enumerate(next_logits(ids).log_softmax(-1).tolist())]
        if not cut_first:
            finished += [h for h in extensions if h[1][-1] == EOS]
            extensions = [h for h in extensions if h[1][-1] != EOS]
        hypotheses = sorted(extensions, reverse=largest)[:beam_size]
        if not stay or length == max_length:
            done = [h for h in hypotheses if h[1][-1] == EOS or length == max_length]
            finished += done
            hypotheses = [h for h in hypotheses if h not in done]
    _, best = max((score(p, ids), ids) for p, ids in finished)
    return [t for t in best if t not in (SOS, EOS)]


def by_length(length_penalty, more=0, without_end=False):
    def score(log_p, ids):
        return log_p / penalized(length_penalty)(len(ids) - 1 + more - (without_end and ids[-1] == EOS))

    return score


@mistake("beam_search", "the length is counted without [EOS]")
def beam_length_without_end(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty, without_end=True))


@mistake("beam_search", "SOS is counted in the length; it is")
def beam_length_with_start(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty, more=1))


@mistake("beam_search", "SOS is counted in the length instead of EOS")
def beam_length_of_words_and_start(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty, more=1, without_end=True))


@mistake("beam_search", "finished hypotheses stay in the beam")
def beam_keeps_finished(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty), stay=True)


@mistake("beam_search", "extensions are sorted in ascending order")
def beam_ascending(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty), largest=False)


@mistake("beam_search", "finished hypotheses are not cut to beam_size")
def beam_finishes_all(next_logits, max_length, beam_size, length_penalty=0.6):
    return flexible_beam(next_logits, max_length, beam_size, by_length(length_penalty), cut_first=False)


@mistake("beam_search", "hypotheses with max_length tokens are finished too")
def beam_drops_unfinished(next_logits, max_length, beam_size, length_penalty=0.6):
    return beam(next_logits, max_length, beam_size, penalized(length_penalty), keep=lambda ids: ids[-1] == EOS)


@mistake("beam_search", "probabilities are summed instead of log-probabilities")
def beam_sums_probabilities(next_logits, max_length, beam_size, length_penalty=0.6):
    return beam(next_logits, max_length, beam_size, penalized(length_penalty), value=lambda x: x.softmax(-1))


@mistake("beam_search", "log-probabilities are not summed: the score is that of the last token alone")
def beam_without_sum(next_logits, max_length, beam_size, length_penalty=0.6):
    hypotheses, finished = [(0.0, [SOS])], []
    for length in range(1, max_length + 1):
        extensions = [
            (m, [*ids, t]) for _, ids in hypotheses for t, m in enumerate(next_logits(ids).log_softmax(-1).tolist())
        ]
        extensions = sorted(extensions, reverse=True)[:beam_size]
        done = [h for h in extensions if h[1][-1] == EOS or length == max_length]
        finished += [(p / penalized(length_penalty)(length), ids) for p, ids in done]
        hypotheses = [h for h in extensions if h not in done]
    return [t for t in max(finished)[1] if t not in (SOS, EOS)]


@mistake("beam_search", "beam_size may be larger than the number of candidates: use min(beam_size, …)")
def beam_top_k_of_vocabulary(next_logits, max_length, beam_size, length_penalty=0.6):
    return next_logits([SOS]).topk(beam_size).indices.tolist()


@mistake("greedy_decode", "max_length does not count SOS")
def greedy_counts_start(next_logits, max_length):
    ids = [SOS]
    while len(ids) < max_length:
        token = int(next_logits(ids).argmax())
        if token == EOS:
            break
        ids.append(token)
    return ids[1:]


# ---------------------------------------------------------------------------- in place


@mistake("residual", "it changes its input x in place; write x = x + … instead of x += …")
def residual_in_place(x, sublayer, norm, dropout):
    x += dropout(sublayer(norm(x)))
    return x


@mistake("layer_norm", "it changes its input x in place")
def norm_in_place(x, gain, bias, eps=1e-5):
    x -= x.mean(-1, keepdim=True)
    return gain * x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() + bias


@mistake("layer_norm", "it changes a tensor in place that the gradient needs; write y = y / z instead of y /= z")
def norm_destroys_gradient(x, gain, bias, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    variance = (centered**2).mean(-1, keepdim=True)
    centered /= (variance + eps).sqrt()
    return gain * centered + bias


# ---------------------------------------------------------------------------- more of steps 2 to 10


@mistake("positional_encoding", "sine and cosine of a pair have different exponents")
def positions_own_exponents(seq_len, d_model):
    angle = torch.arange(seq_len).unsqueeze(1) / 10_000 ** (torch.arange(d_model) / d_model)
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)


@mistake("embed", "sqrt(D) is applied twice; embeddings already does it")
def embed_scaled_twice(ids, weight, dropout):
    return dropout(embeddings(ids, weight) * math.sqrt(weight.size(1)) + encodings_for(ids, weight))


@mistake("causal_mask", "it is transposed")
def causal_transposed(size):
    return torch.ones(1, size, size, dtype=torch.bool).triu()


@mistake("masked_attention", "the softmax is applied twice")
def mask_after_attention(query, key, value, mask):
    _, scores = attention(query, key, value)
    scores = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return scores @ value, scores


@mistake("multi_head_attention", "(here B 2, Q 5, K 7, D 16, h 4)")
def heads_with_length_of_queries(q, k, v, mask, w_q, w_k, w_v, w_o, h):
    B, T, D = q.shape
    query, key, value = (w(x).view(B, T, h, D // h).transpose(1, 2) for w, x in ((w_q, q), (w_k, k), (w_v, v)))
    context, scores = masked_attention(query, key, value, mask)
    return w_o(context.transpose(1, 2).flatten(2)), scores


@mistake("encoder_block", "does not use its argument: lambda y: …(x, …) attends to x before the norm; use y")
def encoder_ignores_argument(x, src_mask, block):
    z = x
    x = block.residual_connections[0](x, lambda y: block.self_attention_block(z, z, z, src_mask))
    return block.residual_connections[1](x, block.feed_forward_block)


@mistake("encoder_block", "[0] on the result of self-attention takes the first sentence")
def encoder_first_sentence(x, src_mask, block):
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, src_mask)[0])
    return block.residual_connections[1](x, block.feed_forward_block)


@mistake("encoder_block", "x is added twice: residual_connections already adds it, in both sublayers")
def encoder_adds_twice(x, src_mask, block):
    x = x + block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, src_mask))
    return x + block.residual_connections[1](x, block.feed_forward_block)


@mistake("encoder_block", "feed-forward comes before self-attention; each uses the other's residual connection")
def encoder_swapped(x, src_mask, block):
    x = block.residual_connections[0](x, block.feed_forward_block)
    return block.residual_connections[1](x, lambda x: block.self_attention_block(x, x, x, src_mask))


@mistake("decoder_block", "does not use its argument: lambda y: …(x, …) attends to x before the norm; use y")
def decoder_ignores_argument(x, encoder_output, src_mask, tgt_mask, block):
    z = x
    x = block.residual_connections[0](x, lambda y: block.self_attention_block(z, z, z, tgt_mask))
    x = block.residual_connections[1](
        x, lambda x: block.cross_attention_block(x, encoder_output, encoder_output, src_mask)
    )
    return block.residual_connections[2](x, block.feed_forward_block)


@mistake("decoder_block", "the feed-forward sublayer does not use its argument")
def decoder_ignores_argument_of_feed_forward(x, encoder_output, src_mask, tgt_mask, block):
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, tgt_mask))
    x = block.residual_connections[1](
        x, lambda x: block.cross_attention_block(x, encoder_output, encoder_output, src_mask)
    )
    z = x
    return block.residual_connections[2](x, lambda y: block.feed_forward_block(z))


@mistake("decoder_block", "x is added twice: residual_connections already adds it, in all sublayers")
def decoder_adds_twice(x, encoder_output, src_mask, tgt_mask, block):
    x = x + block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, tgt_mask))
    x = x + block.residual_connections[1](
        x, lambda x: block.cross_attention_block(x, encoder_output, encoder_output, src_mask)
    )
    return x + block.residual_connections[2](x, block.feed_forward_block)


@mistake("decoder_block", "[0] on the result of cross-attention takes the first sentence")
def decoder_first_sentence(x, encoder_output, src_mask, tgt_mask, block):
    def cross(x):
        return block.cross_attention_block(x, encoder_output, encoder_output, src_mask)[0]

    return decode(x, block, cross, tgt_mask)


@mistake("decoder_block", "the cross-attention sublayer is missing, and feed-forward uses residual_connections[1]")
def decoder_without_cross(x, encoder_output, src_mask, tgt_mask, block):
    x = block.residual_connections[0](x, lambda x: block.self_attention_block(x, x, x, tgt_mask))
    return block.residual_connections[1](x, block.feed_forward_block)


@mistake("decoder_block", "cross-attention comes before self-attention; each uses the other's")
def decoder_swapped(x, encoder_output, src_mask, tgt_mask, block):
    x = block.residual_connections[0](
        x, lambda x: block.cross_attention_block(x, encoder_output, encoder_output, src_mask)
    )
    x = block.residual_connections[1](x, lambda x: block.self_attention_block(x, x, x, tgt_mask))
    return block.residual_connections[2](x, block.feed_forward_block)


# A causal mask for batches, which the shape of step 6 excludes.
@mistake("causal_mask", "has the shape (4, 4), not (1, 4, 4)")
def causal_without_batch(size):
    return causal_mask(size)[0]
