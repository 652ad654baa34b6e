"""The texts of the course: explanations and hints of the twelve steps, ten questions with answers, a glossary.

The exercises themselves are the functions of build_it_yourself.py. Texts start and end with a line break, which
notebook.py and command.py strip.
"""

from typing import NamedTuple


class Lesson(NamedTuple):
    """The texts of one step."""

    text: str  # Markdown, with the formula and the section of the paper
    hint: str
    references: tuple[str, ...]  # what to compare with, as expressions whose source is shown; may be empty


class Question(NamedTuple):
    """A question, its answer, and a cell that shows it."""

    question: str
    answer: str
    code: str


LESSONS = [
    Lesson(
        r"""
A token is a number, its row in a table of vectors. The table is learned. The paper multiplies each row by the square
root of the width: where the table also serves as the last layer, its numbers are small, and the factor makes the
embeddings as large as the positional encodings that are added next.

$$\text{embeddings}(ids) = W_{ids} \cdot \sqrt{D}$$

Vaswani et al., 2017, section 3.4.
""",
        r"""
Indexing a (V, D) table with a (B, T) tensor gives (B, T, D). D is `weight.size(1)`.
""",
        ("model.InputEmbeddings",),
    ),
    Lesson(
        r"""
Attention has no order: it treats a sentence as a set. So the position is added to each embedding, as a vector of
sines and cosines of different wavelengths, from $2\pi$ to $10\,000 \cdot 2\pi$. Dropout comes after the sum.

$$PE_{pos, 2i} = \sin\left(pos / 10\,000^{2i/D}\right) \qquad PE_{pos, 2i+1} = \cos\left(pos / 10\,000^{2i/D}\right)$$

Vaswani et al., 2017, section 3.5; dropout: section 5.4.
""",
        r"""
`torch.arange(0, d_model, 2)` has the exponents 2i. Divide positions of shape (T, 1) by a row of shape (D / 2,), then
fill the even columns, `pe[:, 0::2]`, with sines and the odd ones, `pe[:, 1::2]`, with cosines. `embed` calls your
`embeddings` and `positional_encoding`.
""",
        ("model.PositionalEncoding",),
    ),
    Lesson(
        r"""
Layer normalization keeps the vectors of a deep network in a range in which it can learn. Each vector, that is each
position of each sentence, is normalized by its own mean and variance. A learned gain and bias follow.

$$\text{LN}(x) = g \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + b \qquad \mu = \frac{1}{D} \sum_i x_i \qquad
\sigma^2 = \frac{1}{D} \sum_i (x_i - \mu)^2$$

Ba et al., 2016, "Layer Normalization", equation 4; used in Vaswani et al., 2017, section 3.1. (The tutorial divides by
D − 1 and adds eps to the standard deviation.) The project uses `nn.LayerNorm`, which is written in C++, so no source
is shown in this step.
""",
        r"""
Mean and variance are over the last dimension, with `keepdim=True`. `x.var` divides by D - 1 unless it gets
`correction=0`. eps is added to the variance, before the square root.
""",
        (),
    ),
    Lesson(
        r"""
After attention has moved information between positions, the feed-forward block processes each position by itself: two
linear layers with a ReLU in between. The inner layer is wider than the model. Without the ReLU the two layers would
be one linear map.

$$\text{FFN}(x) = \max(0, x W_1 + b_1)\, W_2 + b_2$$

Vaswani et al., 2017, equation 2 (section 3.3). (The project's block has one more dropout, between the layers.)
""",
        r"""
`linear_1(x)` applies W_1 and b_1. `torch.relu` is max(0, x).
""",
        ("model.FeedForwardBlock",),
    ),
    Lesson(
        r"""
Every position has a query, a key and a value. A query is compared with all keys by dot products; the softmax turns
these into weights that sum to 1; the context is the weighted mean of the values. If queries and keys have independent
components of variance 1, their dot product has variance $d_k$, so it is divided by $\sqrt{d_k}$.

$$\text{Attention}(Q, K, V) = \text{softmax}\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$

Vaswani et al., 2017, equation 1 (section 3.2.1). The function returns the pair (context, scores). As in the tutorial,
the returned scores are those after the softmax, the attention weights.

The cell after the check applies your function to three words with $d_k = 2$. Compute the first row of scores and
context by hand:

| word | query | key | value |
|---|---|---|---|
| 0 | (1, 0) | (1, 0) | (1, 0) |
| 1 | (0, 1) | (0, 2) | (0, 1) |
| 2 | (1, 1) | (1, 1) | (2, 2) |

The project's own function also applies the mask; step 6 shows its source.
""",
        r"""
`key.transpose(-2, -1)` swaps the last two dimensions and works with any number of dimensions before them. The softmax
is over the keys, the last dimension. Return the context and the scores.
""",
        (),
    ),
    Lesson(
        r"""
A mask says which keys a query may attend to: no padding, and in the decoder no later position, since in translation
the later words do not exist yet. Masks are boolean here, True = may attend. Where the mask is False,
$Q K^\top / \sqrt{d_k}$ is set to $-\infty$ before the softmax, so that the weight is exactly 0 and the others still
sum to 1.

$$\text{softmax}(s)_j = 0 \text{ where } s_j = -\infty$$

Vaswani et al., 2017, section 3.2.3, third item. [PAD] has the id `PAD`.
""",
        r"""
`ids != PAD` has the shape (B, S); `[:, None, None, :]` inserts two dimensions. `torch.ones(...).tril()` keeps the
lower triangle with the diagonal. `scores.masked_fill(~mask, -math.inf)` comes between the division and the softmax.
""",
        ("dataset.padding_mask", "model.causal_mask", "model.MultiHeadAttentionBlock.scores"),
    ),
    Lesson(
        r"""
A single head computes one weighted mean per position, which mixes what it finds in different places. Several heads,
each with $d_k = D / H$ dimensions, attend to different places separately, at the cost of one large head. Three linear
layers compute queries, keys and values for all heads together, and a fourth mixes what the heads found.

$$\text{MultiHead}(Q, K, V) = \text{Concat}(head_1, \ldots, head_H)\, W^O \qquad
head_i = \text{Attention}(Q W^Q_i, K W^K_i, V W^V_i)$$

Vaswani et al., 2017, section 3.2.2. In the project's code, the argument `cache` belongs to question 9 at the end.
""",
        r"""
Split with `x.view(B, T, h, d_k).transpose(1, 2)`: (B, T, D) -> (B, H, T, d_k). A view to (B, h, T, d_k) has the same
shape but mixes positions and heads. To join, transpose back, then `flatten(2)`.
""",
        ("model.MultiHeadAttentionBlock.split_heads", "model.MultiHeadAttentionBlock.forward"),
    ),
    Lesson(
        r"""
Every sublayer only adds something to its input. So the input, and in training the gradient, always has a path through
the whole stack. The paper normalizes the sum (post-norm); this project, as most models since, normalizes the input of
the sublayer (pre-norm), which trains without a careful warmup.

$$y = x + \text{Dropout}(\text{Sublayer}(\text{LN}(x)))$$

He et al., 2016 (residual connections); Vaswani et al., 2017, section 3.1 (post-norm); Xiong et al., 2020, figure 1b
(pre-norm).
""",
        r"""
It is one line. x itself is neither normalized nor dropped.
""",
        ("model.ResidualConnection",),
    ),
    Lesson(
        r"""
An encoder block is self-attention, then feed-forward, each in a residual connection. In self-attention queries, keys
and values come from the same sentence. The encoder is a stack of blocks; since pre-norm leaves the sum unnormalized,
a final norm follows.

$$x \leftarrow x + \text{SelfAttention}(\text{LN}(x)) \qquad x \leftarrow x + \text{FFN}(\text{LN}(x))$$

Vaswani et al., 2017, section 3.1. `block` has the sublayers of one block as functions; its residual connections call
your function of step 8, so they already contain norm, dropout and sum.
""",
        r"""
A residual connection takes a function of x: `block.residual_connections[0](x, lambda x: block.self_attention_block(x,
x, x, src_mask))`. The feed-forward block is such a function already.
""",
        ("model.EncoderBlock.forward", "model.Encoder.forward"),
    ),
    Lesson(
        r"""
A decoder block has three sublayers. Self-attention with the causal mask reads the translation so far. Cross-attention
reads the source: its queries come from the decoder, its keys and values from the encoder's output. Feed-forward
follows.

$$x \leftarrow x + \text{SelfAttention}(\text{LN}(x)) \quad x \leftarrow x + \text{CrossAttention}(\text{LN}(x), E, E)
\quad x \leftarrow x + \text{FFN}(\text{LN}(x))$$

Vaswani et al., 2017, sections 3.1 and 3.2.3.
""",
        r"""
Write the function of `encoder_block` with one more line between its two. Cross-attention is
`block.cross_attention_block(x, encoder_output, encoder_output, src_mask)`; self-attention has `tgt_mask`.
""",
        ("model.DecoderBlock.forward", "model.Decoder.forward"),
    ),
    Lesson(
        r"""
A linear layer turns the decoder's output into one logit per word. In training the decoder reads the reference
translation (teacher forcing) and predicts at each position the next word, so labels are the target shifted by one.
Label smoothing keeps the model from being too sure: the target distribution has $\epsilon / V$ on every word and $1 -
\epsilon$ more on the label. Padding does not count, and every target token of the batch counts the same.

$$L = -\frac{1}{N} \sum_{\text{tokens}} \left[ (1 - \epsilon) \log p(\text{label}) + \frac{\epsilon}{V} \sum_v \log p(v)
\right]$$

Vaswani et al., 2017, sections 3.4 and 5.4; Szegedy et al., 2016, section 7.
""",
        r"""
`target[:, :-1]` and `target[:, 1:]`. For the loss, `log_p = logits.log_softmax(-1)`; `log_p.gather(-1,
label.unsqueeze(-1)).squeeze(-1)` is the log-probability of each label, `log_p.mean(-1)` is the second sum with its 1
/ V. N is the number of labels that are not PAD.
""",
        ("model.ProjectionLayer.forward", "dataset.batch_of", "compute.ops.plain_loss"),
    ),
    Lesson(
        r"""
Greedy decoding starts with [SOS] and appends the most probable word until that is [EOS]. Beam search keeps several
hypotheses, so that a word that looks worse at first can win later. The log-probability of a sentence is the sum of
those of its words; it falls with every word, so sentences of different lengths are compared after division by a
normalizer.

$$\text{score}(y) = \log p(y) \Big/ \left(\frac{5 + |y|}{6}\right)^{\alpha}$$

Vaswani et al., 2017, section 6.1; Wu et al., 2016, equation 14. $|y|$ is the number of tokens after [SOS], [EOS]
included; $\alpha$ is `length_penalty`. `next_logits` takes a list of ids that starts with `SOS`.
The project's code does the same for a batch on a GPU and refills the beam; read `greedy_decode` first.
""",
        r"""
Greedy: a loop over `next_logits(ids).argmax()`. Beam search: keep hypotheses as pairs (log-probability, ids). In each
step make a list of all extensions, with `next_logits(ids).log_softmax(-1).tolist()`, sort it, cut it to `beam_size`,
and move those that end to a second list together with their scores.
""",
        ("search.greedy_decode", "search.beam_search"),
    ),
]


QUESTIONS = [
    Question(
        "Why are scores divided by sqrt(d_k)?",
        r"""
A dot product of d_k components has variance d_k. Large scores make the softmax put nearly all weight on one key,
where its gradient is almost 0. After the division the largest weight no longer depends on d_k.
""",
        r"""
for d_k in (4, 16, 64, 256):
    query, key = torch.randn(1000, d_k), torch.randn(20, d_k)
    scores = query @ key.T
    scaled = scores / math.sqrt(d_k)
    largest = [x.softmax(-1).max(-1).values.mean().item() for x in (scores, scaled)]
    print(f"d_k {d_k:3}   variance {scores.var():5.1f}, scaled {scaled.var():.1f}", end="   ")
    print(f"mean largest weight {largest[0]:.2f}, scaled {largest[1]:.2f}")
""",
    ),
    Question(
        "What happens if the causal mask is forgotten?",
        r"""
In training the decoder then sees the word that it has to predict, and copies it. So the training loss is lower than
that of the right model, although the training was shorter. In translation the word does not exist yet: BLEU is near 0.
A training loss that is too good is the sign of this mistake.
""",
        r"""
def see_all(size):
    return torch.ones(1, size, size, dtype=torch.bool)


cheating = SimpleNamespace(**{**vars(mine), "causal_mask": see_all})
cheater = own_model.train(cheating, corpus, steps=200, log_every=100)
batch = corpus.train[list(range(100))]
for name, functions, trained in (("with the mask", mine, own), ("without", cheating, cheater)):
    loss = own_model.batch_loss(functions, trained, batch, 0.0)
    print(f"{name:13}   training loss {loss:.3f}   BLEU {own_model.bleu(functions, trained, corpus, 20):.1f}")
""",
    ),
    Question(
        "Why does label smoothing keep the top probability near 90%?",
        r"""
The loss is lowest when the prediction equals the smoothed target: 1 - 0.1 + 0.1 / V on the label. A higher probability
increases the loss. Where several words are possible, it is lower.
""",
        r"""
next_logits = own_model.next_logits_of(mine, own, own_model.encode(corpus, SENTENCE))
ids = [SOS]
while ids[-1] != EOS and len(ids) < 20:
    p = next_logits(ids).softmax(-1)
    ids.append(int(p.argmax()))
    print(f"{corpus.tokenizer_tgt.id_to_token(ids[-1]):12} {p.max():.3f}")
print(f"smoothed target: {1 - 0.1 + 0.1 / len(p):.3f}")
""",
    ),
    Question(
        "What does a head do without [SOS] to rest on?",
        r"""
The weights of a row sum to 1, so a head that finds nothing must attend somewhere. In decoder self-attention some heads,
mostly in the first layer, then attend to the first token, [SOS], which is always there (Xiao et al., 2024, call it an
attention sink). If this
weight is spread over the other keys, such heads add noise: BLEU drops. The encoder and cross-attention can rest on
other tokens, such as the final punctuation mark and [EOS], and hardly need it.
""",
        r"""
reference = own_model.with_own_weights(own, corpus)
translator = own_model.translator_of(reference, corpus)
weights = record_trace(translator, SENTENCE).weights
for kind in ("encoder", "decoder", "cross"):
    first = weights[kind][..., 1:, 0].mean(-1).round(2)  # row 0 of the decoder sees no other token
    print(f"{kind}: weight on the first token, layers x heads\n{first}")
    with interventions.intervene(reference, without_first, kind):
        predicted = translator.translate(corpus.sources)
    print(f"BLEU without it {score(predicted, corpus.references)['bleu']:.1f}")
""",
    ),
    Question(
        "Why pre-norm?",
        r"""
In a post-norm stack every layer normalizes the sum, and the gradient has to pass all these norms. At the start of
training it is then very uneven over the layers (Xiong et al., 2020, section 3.3), so that a high learning rate needs
a careful warmup. With pre-norm the residual path is free, and the gradients of the layers are similar.
""",
        r"""
def post_norm(x, sublayer, norm, dropout):
    return norm(x + dropout(sublayer(x)))


deep = corpus._replace(config=replace(corpus.config, encoder_layers=8, decoder_layers=8))
batch = next(own_model.batches(corpus, 1))
for name, function in (("pre-norm", mine.residual), ("post-norm", post_norm)):
    functions = SimpleNamespace(**{**vars(mine), "residual": function})
    model_8 = own_model.new_model(functions, deep)
    own_model.batch_loss(functions, model_8, batch).backward()
    norms = [layer.feed_forward_block.linear_2.weight.grad.norm() for layer in model_8.decoder.layers]
    print(name, "gradient norm per decoder layer:", " ".join(f"{norm:.3f}" for norm in norms))
""",
    ),
    Question(
        "Why positions?",
        r"""
Without them attention sees a set of words. If the words are reordered, the encoder's output is reordered in the same
way and not changed otherwise: who eats whom is lost. With positions every order has its own output.
""",
        r"""
def only_embeddings(ids, weight, dropout):
    return dropout(mine.embeddings(ids, weight))


source = own_model.encode(corpus, SENTENCE)
order = torch.arange(source.size(1)).flip(0)
for name, function in (("without", only_embeddings), ("with", mine.embed)):
    other = own_model.OwnTransformer(SimpleNamespace(**{**vars(mine), "embed": function}), own)
    straight, reversed_ = (other.encode(x, mine.padding_mask(x)) for x in (source, source[:, order]))
    print(f"{name} positions, the same words differ by {(straight[:, order] - reversed_).abs().max():.2g}")
""",
    ),
    Question(
        "What does padding do without a mask?",
        r"""
A sentence is padded to the longest of its batch. Without the mask [PAD] gets weight like a word, so the translation
depends on which other sentences are in the batch. With the mask it changes nothing.
""",
        r"""
source = own_model.encode(corpus, SENTENCE)
padded = torch.cat([source, torch.full((1, 20), PAD)], 1)
see_all = torch.ones(1, 1, 1, padded.size(1), dtype=torch.bool)
alone = own_model.next_logits_of(mine, own, source)([SOS]).softmax(-1)
for name, mask in (("with", mine.padding_mask(padded)), ("without", see_all)):
    p = own_model.next_logits_of(mine, own, padded, mask)([SOS]).softmax(-1)
    print(f"{name} the mask, 20 [PAD] change the probability of the first word by {(p - alone).abs().max():.2g}")
""",
    ),
    Question(
        "Why is greedy decoding not optimal?",
        r"""
It chooses the most probable word at each step and never revises a choice. The cell first searches with a table of
probabilities instead of a model. There, the sentence starts with the token 4 (probability 0.55) or 5 (0.45). After 5 it
always ends, so the sentence "5" has probability 0.45. After 4 each further step has three continuations, none more
probable than 0.34, so no sentence that starts with 4 reaches more than 0.55 · 0.34 ≈ 0.19. Greedy decoding takes 4; a
beam of 2 keeps both and returns 5. Linguists call a sentence that misleads its reader in this way a garden-path
sentence. On the toy corpus the two searches rarely differ, since the model is sure of nearly every word.
""",
        r"""
path = checks.garden_path
print("greedy:", mine.greedy_decode(path, 4), " beam of 2:", mine.beam_search(path, 4, 2, 0.0))
sentences = corpus.sources[:20]
greedy = own_model.translate(mine, own, corpus, sentences)
beam = own_model.translate(mine, own, corpus, sentences, beam_size=3)
print(f"{sum(g != b for g, b in zip(greedy, beam))} of {len(sentences)} translations differ")
""",
    ),
    Question(
        "Why does a cache change nothing?",
        r"""
The causal mask makes the keys and values of a position independent of later positions. So they can be kept when the
next word is computed. The project's model, with your weights, translates with and without a cache.
""",
        r"""
reference = own_model.with_own_weights(own, corpus)
translator = own_model.translator_of(reference, corpus)
for use_cache in (False, True):
    start = time.perf_counter()
    translations = translator.translate(corpus.sources, use_cache=use_cache)
    print(f"cache {use_cache!s:5}   {time.perf_counter() - start:.2f} s   {translations[0]}")
yours = own_model.translate(mine, own, corpus, corpus.sources[:20])
print("the same as your greedy decoding:", translations[:20] == yours)
""",
    ),
    Question(
        "Why does the loss per token differ from the mean over batches?",
        r"""
Batches hold different numbers of target tokens. In the mean of batch means, a token of a small batch counts more than
one of a large batch; with gradient accumulation or several GPUs this changes the gradient. Dividing the sum of all
losses by the number of all tokens treats every token alike.
""",
        r"""
losses, counts = [], []
for sentences in ([0], list(range(1, 200))):  # a batch of one sentence and one of 199
    batch = corpus.train[sentences]
    losses.append(own_model.batch_loss(mine, own, batch, 0.0).item())
    counts.append(int((batch["label"] != PAD).sum()))
per_token = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
print(f"losses {losses[0]:.4f} and {losses[1]:.4f} of {counts[0]} and {counts[1]} tokens")
print(f"mean of the batches {sum(losses) / 2:.4f}, mean of the tokens {per_token:.4f}")
""",
    ),
]


GLOSSARY = {
    "Adam": (
        "an optimizer that scales each parameter's step by running means of its gradient and of the gradient's square"
    ),
    "attention": "a weighted mean of values, with weights from the comparison of a query with keys",
    "attention sink": "a token, often the first, that gets the weight of heads which find nothing else to attend to",
    "autoregressive": "producing one token at a time, each from those before it",
    "batch": "sentences that are computed together, padded to the same length",
    "beam search": "a search that keeps the W most probable hypotheses at each step",
    "BLEU": "a score from 0 to 100 of a translation: n-grams shared with a reference, with a penalty for brevity",
    "causal mask": "the mask that hides later positions from a query",
    "cross-attention": "attention whose queries come from the decoder and whose keys and values come from the encoder",
    "cross-entropy": "the mean negative log-probability of the labels, in nats",
    "d_model": "the width D of the vectors between the layers, the residual stream",
    "decoder": "the stack that reads the translation so far and the encoder output",
    "dropout": "zeroing random activations in training, against overfitting",
    "embedding": "the learned vector of a token",
    "encoder": "the stack that turns the source into one vector per token",
    "epoch": "one pass over all training pairs",
    "feed-forward block": "two linear layers with a ReLU, applied to each position separately",
    "gradient": "the derivatives of the loss with respect to the parameters; training changes parameters against it",
    "greedy decoding": "taking the most probable token at each step",
    "head": "one of several attentions that run in parallel, each with d_k dimensions",
    "hypothesis": "a partial or finished translation that a search keeps, with its log-probability",
    "key-value cache": "keys and values of earlier positions, kept so that they are not computed again",
    "label": "the token that the decoder has to predict at a position",
    "label smoothing": "moving a share of the target probability from the label to all tokens",
    "layer normalization": "shifting and scaling each vector to mean 0 and variance 1",
    "logits": "the numbers before the softmax, one per token of the vocabulary",
    "padding": "[PAD] tokens that make the sentences of a batch equally long",
    "positional encoding": "a vector that depends on the position only, added to the embedding",
    "pre-norm": "normalizing the input of a sublayer; post-norm normalizes the sum after it",
    "query, key, value": (
        "three projections of a vector: a query is compared with keys, and the weights apply to values"
    ),
    "ReLU": "max(0, x), the activation of the feed-forward block",
    "residual connection": "adding a sublayer's input to its output",
    "self-attention": "attention whose queries, keys and values come from the same sequence",
    "softmax": "exponentials divided by their sum: positive numbers that sum to 1",
    "teacher forcing": "training the decoder on the reference translation instead of its own",
    "token": "a unit of text with an id: a word, a subword, a punctuation mark, or a special token such as [SOS]",
    "warmup": "raising the learning rate from 0 over the first steps",
}
