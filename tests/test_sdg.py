"""The parts of sdg_sod.py: numbers by hand, brute force, invariances."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sdg_sod
from common import bank
from common.backbones import backbone
from common.rivals import Affinity, ContextDecoder
from common.runtime import UserError, World
from data import captions, ladder
from data.captions import END, PAD, START
from data.shapes import NAMED, Shapes, describe

CHANNELS = (24, 48, 96, 128)
WORDS = ["[PAD]", "[START]", "[END]", "a", "red", "star", "left", "right", "of", "disc"]


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return [torch.rand(2, c, 32 // 2**i, 40 // 2**i) for i, c in enumerate(CHANNELS)]


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    net = sdg_sod.Captioner(backbone("tiny"), WORDS, 64, layers=2, beam=1)
    for p in [*net.forwards.parameters(), net.words.weight, net.positions.weight]:
        torch.nn.init.normal_(p, std=0.3)  # with a random start the picture hardly matters
    return net.eval()


def net(name="mit_tiny", guidance=None, captioner=None):
    torch.manual_seed(0)
    encoder = sdg_sod.MiT(name)
    return sdg_sod.SDGSOD(encoder, sdg_sod.MLPDecoder(encoder.channels, 16), guidance, captioner)


# ---- The saliency branch -------------------------------------------------------------------------
@torch.no_grad()
def test_attention_equals_equations_1_and_2_written_out():
    torch.manual_seed(0)
    attention, x = sdg_sod.Attention(8, 2, 2), torch.randn(1, 4, 6, 8)
    patches = x[0].unflatten(0, (2, 2)).unflatten(2, (3, 2))  # [2, 2, 3, 2, 8]
    patches = patches.permute(0, 2, 4, 1, 3).reshape(6, 8 * 4)  # Reshape(X, R), R = 4
    reduced = patches @ attention.sr.weight.flatten(1).T + attention.sr.bias
    reduced = F.layer_norm(reduced, (8,), attention.norm.weight, attention.norm.bias)
    k, v = attention.kv(reduced).chunk(2, 1)
    q, heads = attention.q(x[0].flatten(0, 1)), []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[:, h] @ k[:, h].T / math.sqrt(4)).softmax(1) @ v[:, h])
    by_hand = attention.proj(torch.cat(heads, 1)).view(1, 4, 6, 8)
    assert torch.allclose(attention(x), by_hand, atol=1e-6)


def test_drop_path_drops_whole_images_in_training_alone():
    block, x = sdg_sod.Block(8, 2, 1, 0.5), torch.ones(1000, 1, 1, 8)
    torch.manual_seed(0)
    kept = block.drop_path(x)[:, 0, 0]
    assert set(kept.unique().tolist()) == {0, 2} and (kept == kept[:, :1]).all()
    assert kept.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(block.eval().drop_path(x), x)


@torch.no_grad()
def test_drop_path_grows_over_the_blocks():
    drops = [block.drop for stage in sdg_sod.MiT("mit_b0").stages for block in stage.blocks]
    assert drops == pytest.approx([0.1 * i / 7 for i in range(8)])


@pytest.mark.parametrize("kind", ["mlp", "literal", "psp", "aspp", "apc", "ann"])
def test_every_decoder_gives_one_map_and_uses_what_it_should(kind, features):
    torch.manual_seed(0)
    decoder = (
        sdg_sod.MLPDecoder(CHANNELS, 16, kind == "literal")
        if kind in ("mlp", "literal")
        else ContextDecoder(kind, CHANNELS, 16)
    )
    inputs = [f.clone().requires_grad_() for f in features]
    out = decoder(inputs)
    expected = {"mlp": (32, 40), "literal": (32, 40), "ann": (4, 5)}.get(kind, (16, 20))
    assert out.shape == (2, 1, *expected)
    out.square().sum().backward()
    used = [f.grad is not None and bool(f.grad.abs().sum() > 0) for f in inputs]
    assert used == [kind != "ann", kind != "ann", True, True]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@torch.no_grad()
def test_affinity_equals_a_loop_over_pixels():
    torch.manual_seed(0)
    module, x = Affinity(6, 4, 2).eval(), torch.randn(1, 6, 4, 4)
    regions = module.region(F.adaptive_avg_pool2d(x, 2)).flatten(2)[0]  # [4, 4]
    y = module.reduce(x)
    w = module.weigh(y + y.mean((2, 3), keepdim=True))[0]  # [4 regions, 4, 4]
    z = torch.zeros(1, 4, 4, 4)
    for i in range(4):
        for j in range(4):
            z[0, :, i, j] = sum(w[r, i, j] * regions[:, r] for r in range(4))
    assert torch.allclose(module(x), module.fuse(y + module.back(z)), atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (70, 50), (33, 64)])
@torch.no_grad()
def test_any_size_gives_a_map_of_its_size(size):
    assert net().eval()(torch.rand(1, 3, *size)).shape == (1, 1, *size)


# ---- Guidance ------------------------------------------------------------------------------------
def test_the_sum_of_resized_maps_is_the_resized_sum(features):
    maps = torch.rand(2, 9, 7, 7)
    for f in features:
        summed = sdg_sod.resize(maps, f).sum(1, keepdim=True)
        assert torch.allclose(summed, sdg_sod.resize(maps.sum(1, keepdim=True), f), atol=1e-5)


def test_eq_3_by_hand():
    f, m = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.tensor([[[[1.0, 3.0]]]])
    guidance = sdg_sod.Guidance((2,), [1], "max")
    guidance.xi["1"].weight.data = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).view(2, 2, 1, 1)
    guidance.xi["1"].bias.data = torch.tensor([10.0, 20.0])
    out = guidance([f], m)[0]  # f * m = 1/3 2; 1 4
    assert torch.allclose(
        out, torch.tensor([[[[1 + 1 + 10, 2 + 4 + 10]], [[3 + 2 / 3 + 20, 4 + 4 + 20]]]])
    )


@pytest.mark.parametrize(
    "kind, expected",
    [("minmax", [0, 1 / 3, 1]), ("max", [1 / 4, 1 / 2, 1]), ("l1", [3 / 7, 6 / 7, 12 / 7])],
)
def test_normalise(kind, expected):
    m = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3)
    out = sdg_sod.Guidance(CHANNELS, [1], kind).normalise(m)
    assert out.flatten().tolist() == pytest.approx(expected)
    assert torch.equal(sdg_sod.Guidance(CHANNELS, [1], kind).normalise(0 * m), 0 * m)


def test_mean_divides_by_the_number_of_words():
    maps = torch.rand(1, 5, 49).softmax(2).view(1, 5, 7, 7)
    out = sdg_sod.Guidance(CHANNELS, [1], "mean").normalise(maps.sum(1, keepdim=True))
    assert torch.allclose(out, maps.mean(1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_guidance_that_starts_at_0_changes_nothing(captioner):
    image, m = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 7, 7)
    plain = net().eval()(image)
    guidance = sdg_sod.Guidance(CHANNELS, [1, 2, 3, 4], "minmax")
    guided = net(guidance=guidance, captioner=captioner)
    guided.load_state_dict(guided.state_dict() | net().state_dict())  # encoder and decoder
    assert torch.equal(guided.eval()(image, m), plain)
    for xi in guidance.xi.values():
        torch.nn.init.normal_(xi.weight, std=0.02)
    assert not torch.allclose(guided(image, m), plain)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_only_the_chosen_scale_is_guided(scale, features):
    guidance = sdg_sod.Guidance(CHANNELS, [scale], "minmax")
    torch.nn.init.normal_(guidance.xi[str(scale)].weight)
    guided = guidance(features, torch.rand(2, 1, 7, 7))
    same = [torch.equal(f, g) for f, g in zip(features, guided)]
    assert same == [i + 1 != scale for i in range(4)]


def test_the_captioner_is_frozen_and_never_in_training_mode(captioner):
    guided = net(guidance=sdg_sod.Guidance(CHANNELS, [1], "max"), captioner=captioner).train()
    assert guided.decoder.training and not captioner.training
    guided(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in captioner.parameters())


# ---- The captioner -------------------------------------------------------------------------------
@torch.no_grad()
def test_rows_of_attention_belong_to_their_words(captioner):
    """Row of the step that predicts word j, or that reads it; each sums to 1, no others count."""
    image = torch.rand(3, 3, 64, 64)
    word, maps = captioner.attend(image)
    grid = captioner.encode(image)
    tokens = torch.cat([torch.full((3, 1), START), word], 1)
    attention = captioner.read(grid, tokens[:, :30])[1].unflatten(2, (7, 7))
    said = word > END
    assert said.any() and torch.allclose(maps.sum((2, 3)), said.float(), atol=1e-5)
    captioner.row = "read"
    word_read, maps_read = captioner.attend(image)
    captioner.row = "predict"
    assert torch.equal(word, word_read)
    for b, j in said.nonzero().tolist():
        assert torch.allclose(maps[b, j], attention[b, j], atol=1e-6)
        if j + 1 < attention.shape[1]:
            assert torch.allclose(maps_read[b, j], attention[b, j + 1], atol=1e-6)
    assert torch.allclose(captioner.guidance(image), maps.sum(1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_a_row_does_not_depend_on_later_words(captioner):
    grid = captioner.encode(torch.rand(1, 3, 64, 64))
    one, two = torch.tensor([[1, 3, 4, 5]]), torch.tensor([[1, 3, 6, 7]])
    (p, a), (q, b) = captioner.read(grid, one), captioner.read(grid, two)
    assert torch.allclose(p[:, :2], q[:, :2], atol=1e-5) and torch.allclose(a[:, :2], b[:, :2])
    assert not torch.allclose(a[:, 2], b[:, 2])
    (p, a), (q, b) = (captioner.read(grid, t, backward=True) for t in (one, two))
    assert not torch.allclose(p[:, 3], q[:, 3], atol=1e-5)


def log_likelihood(captioner, grid, tokens):
    """Of the tokens up to the first end."""
    p = captioner.read(grid, tokens[:, :-1])[0].log_softmax(2)
    p = p.gather(2, tokens[:, 1:, None])[..., 0]
    return (p * ((tokens[:, :-1] == END).cumsum(1) == 0)).sum(1)


@torch.no_grad()
def test_a_beam_of_one_is_greedy_and_a_wide_one_is_likelier(captioner):
    grid = captioner.encode(torch.rand(4, 3, 64, 64))
    greedy, row = captioner.write(grid[:1]), [START]
    for t in range(30):
        p = captioner.read(grid[:1], torch.tensor([row]))[0][0, -1]
        if t:
            p[row[-1]] = -math.inf
        row.append(int(p.argmax()))
        if row[-1] == END:
            break
    assert greedy[0].tolist() == row
    captioner.beam = 5
    wide = captioner.write(grid)
    captioner.beam = 1
    narrow = captioner.write(grid)
    assert (wide[:, 1:-1] != wide[:, 2:])[wide[:, 1:-1] > END].all()  # no word twice in a row
    likely = [log_likelihood(captioner, grid, tokens).sum() for tokens in (wide, narrow)]
    assert likely[0] > likely[1]


@torch.no_grad()
def test_the_grid_holds_the_deepest_maps_standardised():
    torch.manual_seed(0)
    net = sdg_sod.Captioner(backbone("tiny"), WORDS, 64, taps=2)
    image = torch.rand(4, 3, 224, 224)
    net.encoder.eval()
    *_, four, five = net.encoder(image)  # 14 x 14 and 7 x 7
    x = torch.cat([four.unflatten(2, (7, 2)).unflatten(4, (7, 2)).mean((3, 5)), five], 1)
    deviation = x.var((0, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / deviation
    assert torch.allclose(net.encode(image), net.projection(x.flatten(2).mT), atol=1e-4)
    plain = sdg_sod.Captioner(net.encoder, WORDS, 64, plain=True)
    assert torch.allclose(plain.encode(image), plain.projection(five.flatten(2).mT), atol=1e-5)


def test_caption_loss_by_hand():
    tokens = torch.tensor([[START, 4, 5, END, PAD], [START, 3, END, PAD, PAD]])
    assert sdg_sod.reverse(tokens).tolist() == [[END, 5, 4, START, PAD], [END, 3, START, PAD, PAD]]
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, len(WORDS))
    p = logits.log_softmax(3)
    ahead = [p[0, 0, 0, 4], p[0, 0, 1, 5], p[0, 0, 2, END], p[0, 1, 0, 3], p[0, 1, 1, END]]
    back = [p[1, 0, 0, 5], p[1, 0, 1, 4], p[1, 0, 2, START], p[1, 1, 0, 3], p[1, 1, 1, START]]
    by_hand = -(sum(ahead) + sum(back)) / 5
    assert sdg_sod.caption_loss(tuple(logits), tokens).item() == pytest.approx(by_hand.item())


# ---- Losses, crops, schedule ---------------------------------------------------------------------
def test_structure_loss_by_hand():
    g = torch.zeros(1, 1, 40, 40)
    g[..., 20, 20] = 1
    logit = torch.zeros(1, 1, 40, 40)
    w = torch.ones(40, 40)
    w[5:36, 5:36] += 5 / 961
    w[20, 20] = 1 + 5 * 960 / 961
    iou = 1 - (0.5 * w[20, 20] + 1) / (0.5 * w.sum() + w[20, 20] - 0.5 * w[20, 20] + 1)
    for form in ("weighted", "coded"):  # log 2 everywhere: weights cancel
        loss = sdg_sod.structure_loss(logit, g, form)
        assert loss.item() == pytest.approx(math.log(2) + iou.item(), rel=1e-5)


def test_weights_matter_in_one_form_only():
    g = (torch.arange(64) < 30).float().expand(1, 1, 64, 64)
    logit = 4 * (torch.arange(64) < 38).float().expand(1, 1, 64, 64) - 2  # wrong near the edge
    weighted, coded = (sdg_sod.structure_loss(logit, g, form) for form in ("weighted", "coded"))
    assert weighted > 1.05 * coded


def test_crops_cut_what_they_say():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 1, 8, 8)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5]])
    out = bank.crop(x, box)
    assert torch.allclose(out[0], x[0])
    quarter = F.interpolate(x[:1, :, :4, 4:], (8, 8), mode="bilinear", align_corners=False)
    assert torch.allclose(out[1][:, 1:-1, 1:-1], quarter[0][:, 1:-1, 1:-1])
    boxes = bank.draw_crops(1000, 0.25, torch.Generator().manual_seed(0))
    size = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 1 and 0.75 <= size.min() < 0.76 and size.max() > 0.99


def test_a_cropped_map_equals_the_crop_of_the_resized_map():
    """A ramp from 0 to 6 over the centres of seven cells is 7 u - 1/2 at place u of the photo."""
    ramp = torch.arange(7.0).expand(1, 1, 7, 7)
    box = torch.tensor([[0.25, 0.125, 0.75, 0.625]])  # left, top, right, bottom
    index, straight, mirrored = torch.tensor([0]), torch.tensor([False]), torch.tensor([True])
    out = sdg_sod.cropped_maps(ramp, index, straight, box, 16)
    u = 0.25 + 0.5 * (torch.arange(16) + 0.5) / 16
    assert torch.allclose(out, (7 * u - 0.5).expand(1, 1, 16, 16), atol=1e-5)
    out = sdg_sod.cropped_maps(ramp, index, mirrored, box, 16)
    assert torch.allclose(out, (7 * (1 - u) - 0.5).expand(1, 1, 16, 16), atol=1e-5)

    # Any map: the photo's map resized to four times as many pixels and cropped there.
    m = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(m, (256, 256), mode="bilinear", align_corners=False)[..., 32:160, 64:192]
    exact = F.interpolate(large, (64, 64), mode="area")
    out = sdg_sod.cropped_maps(m, index, straight, box, 64)
    assert (out - exact).abs().mean() < 5e-4
    at_7 = F.interpolate(bank.crop(m, box), (64, 64), mode="bilinear", align_corners=False)
    assert (at_7 - exact).abs().mean() > 0.01  # 20 times as far off
    whole = sdg_sod.cropped_maps(m, index, straight, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 64)
    resized = F.interpolate(m, (64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(whole, resized, atol=1e-6)


def test_the_rate_rises_over_1500_steps_and_falls_to_0():
    assert sdg_sod.rate(0, 50_000) == pytest.approx(1 / 1500)
    assert sdg_sod.rate(1499, 50_000) == pytest.approx(1 - 1499 / 50_000)
    assert sdg_sod.rate(25_000, 50_000) == 0.5
    assert sdg_sod.rate(0, 20) == 0.5 and sdg_sod.rate(19, 20) == pytest.approx(0.05)


# ---- Captions as data ----------------------------------------------------------------------------
def test_vocabulary_and_tokens():
    texts = [["A red star, left of a disc.", "a star"], ["the red disc's edge"]]
    words = captions.vocabulary(texts, 6)
    assert words == ["[PAD]", "[START]", "[END]", "a", "red", "star"]
    tokens, counts = captions.tokenise(texts, words)
    assert tokens[0, 0, :7].tolist() == [START, 3, 4, 5, 3, END, PAD]  # unknown words: left out
    assert counts.tolist() == [2, 1] and tokens.shape == (2, 2, 30)
    maps = torch.rand(30, 7, 7)
    said, looks = captions.spoken(tokens[0, 0], maps, words)
    assert said == ["a", "red", "star", "a"] and torch.equal(looks, maps[1:5])
    said, looks = captions.spoken(tokens[0, 1, 4:], maps, words)  # nothing but padding
    assert said == [] and looks.shape == (0, 7, 7)
    long = captions.tokenise([["a " * 40]], words)[0][0, 0]
    assert long[0] == START and (long[1:] == 3).all()  # cut, without an end


def test_a_mirrored_photo_s_words():
    mirror = captions.mirrored(WORDS)
    words = torch.tensor([WORDS.index(w) for w in "a star left of a disc".split()])
    assert [WORDS[word] for word in mirror[words]] == "a star right of a disc".split()
    assert torch.equal(mirror[mirror], torch.arange(len(WORDS)))


def test_scores_of_captions_by_hand():
    data = Shapes("test", count=20)
    index = next(i for i in range(20) if len(data.objects(i)) == 1)
    sample, (one,) = data[index], data.objects(index)
    scores, mask = captions.Scores(data), torch.from_numpy(one["mask"])
    maps = torch.zeros(3, 160, 160)
    maps[2][mask] = 1 / mask.sum()  # all attention on the object
    scores.add(sample, ["a", one["colour"], one["class"]], maps)
    wrong = next(kind for kind in data.classes if kind != one["class"])
    scores.add(sample, ["zebra", wrong], maps)
    scores.add_next(torch.tensor([[4, 5, 9, 9]]), torch.tensor([[START, 4, 6, END]]))
    assert scores.means() == pytest.approx(
        {
            "next": 1 / 3,
            "said": 3 / 5,
            "true": 1 / 2,
            "inside": 1,
            "area": mask.float().mean().item(),
        }
    )
    scores.merge(World())
    assert scores.means()["said"] == 3 / 5
    silent = captions.Scores(data)  # nobody has described this photo
    silent.add({**sample, "caption": None}, ["a", wrong], maps)
    assert "said" not in silent.means() and silent.means()["true"] == 0


def test_named_shapes_mention_and_mask_some_among_equals():
    data = Shapes("train", named=True, count=12)
    everything = Shapes("train", named=True, count=12)
    everything.salient = describe  # all objects
    areas = {True: [], False: []}
    for i in range(12):
        sample, all_things = data[i], everything.objects(i)
        named = [one for one in all_things if one["class"] in NAMED]
        assert 0 < len(named) < len(all_things)
        union = np.any([one["mask"] for one in named], 0)
        assert np.array_equal(sample["mask"][0] > 127, union)
        for text in sample["caption"]:
            for one in all_things:
                assert one in named or one["class"] not in captions.split(text)
        for one in all_things:
            areas[one["class"] in NAMED].append(one["mask"].mean())
    assert 0.7 < np.mean(areas[True]) / np.mean(areas[False]) < 1.4
    again = Shapes("train", count=12)
    assert again.names != data.names and not torch.equal(again[0]["image"], data[0]["image"])


def test_a_vocabulary_of_another_length_is_refused(tmp_path):
    (tmp_path / "v.vocab").write_text("one\t0\ntwo\t-1\n")
    assert captions.read_vocabulary(tmp_path / "v.vocab", 2) == ["one", "two"]
    assert captions.numbers(2) == ["0", "1"]
    odd = ["a\x85b", "\u2028", "c\x0bd", "e\rf"]  # splitlines() would cut them
    (tmp_path / "odd.vocab").write_bytes("".join(f"{word}\t0\r\n" for word in odd).encode())
    assert captions.read_vocabulary(tmp_path / "odd.vocab", 4) == odd
    with pytest.raises(UserError, match="has 2 lines, but the captioner knows 3 words"):
        captions.read_vocabulary(tmp_path / "v.vocab", 3)


def test_pieces_are_joined_to_words_and_their_maps_added():
    pieces = ["<unk>", "[SOS]", "[EOS]", "\u2581um", "br", "ella", "\u2581a", "s"]
    tokens, maps = torch.tensor([6, 3, 4, 5, 6, 7, END, END]), torch.rand(8, 7, 7)
    said, looks = captions.spoken(tokens, maps, pieces)
    assert said == ["a", "umbrella", "as"]
    assert torch.allclose(looks, torch.stack([maps[0], maps[1:4].sum(0), maps[4:6].sum(0)]))
    assert captions.spoken(tokens[2:], maps, pieces)[0] == ["brella", "as"]  # no start: a word yet
    assert captions.spoken(torch.tensor([3, 4]), maps, captions.numbers(8))[0] == ["3", "4"]
    assert captions.whole(WORDS) and not captions.whole(pieces)
    assert not captions.whole(captions.numbers(8))


# ---- The ladder of maps --------------------------------------------------------------------------
def test_auc_by_hand_and_by_all_pairs():
    heat = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    mask = torch.tensor([[False, True], [False, True]])
    # Salient 2 and 3 against 1 and 2: three pairs are won, one is a tie.
    assert ladder.auc(heat, mask) == pytest.approx(3.5 / 4)
    assert ladder.auc(torch.zeros(2, 2), mask) == 0.5
    random = torch.Generator().manual_seed(0)
    heat = torch.randint(0, 9, (12, 12), generator=random).float()
    mask = torch.rand(12, 12, generator=random) < 0.3
    pairs = heat[mask][:, None] - heat[~mask]
    by_pairs = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
    assert ladder.auc(heat, mask) == pytest.approx(by_pairs)


def test_maps_of_the_ladder_by_hand():
    centre = ladder.centre_map()
    assert centre[0, 0, 3, 5] == pytest.approx(math.exp(-1 / 2))  # two cells: one deviation
    assert centre[0, 0, 0, 0] == pytest.approx(math.exp(-18 / 8))
    mask = torch.zeros(1, 1, 56, 56)
    mask[..., :8, 8:12] = 1  # the left half of the second cell
    cells = ladder.mask_map(mask)
    assert cells[0, 0, 0, 1] == 0.5 and cells.sum() == 0.5

    # Two photos with two and four words; every word's map sums to 1.
    sums = torch.zeros(2, 1, 7, 7)
    sums[0, 0, 0, 0], sums[1, 0, 0, 0], sums[1, 0, 6, 6] = 2, 1, 3
    maps = ladder.rungs(sums, sums, mask.expand(2, 1, 56, 56), None, torch.Generator())
    assert torch.equal(maps["captioner_other"], sums.flip(0))  # the only other photo
    assert maps["captioner_mean"][0, 0, 0, 0] == (1 + 1 / 4) / 2
    assert maps["captioner_less_mean"][1, 0, 6, 6] == 3 / 4 - 3 / 8
    assert "training_masks" not in maps and torch.equal(maps["mask"][:1], cells)


def test_other_photos_are_a_seeded_permutation_that_leaves_none_in_its_place():
    for count in (2, 3, 10, 101):
        of = ladder.others(count, torch.Generator().manual_seed(count))
        assert sorted(of.tolist()) == list(range(count))
        assert (of != torch.arange(count)).all()
    again = ladder.others(101, torch.Generator().manual_seed(101))
    assert torch.equal(of, again) and not torch.equal(of, torch.arange(101).roll(1))


def test_the_ladder_leaves_out_masks_that_have_one_side(tmp_path, capsys):
    """A map that is the mask's own cells wins; empty, full and missing masks do not count."""
    half = torch.zeros(1, 56, 112, dtype=torch.uint8)
    half[..., :56] = 255
    masks = [half, torch.zeros_like(half), torch.full_like(half, 255), None, half.flip(2)]
    sums = torch.stack([ladder.mask_map(half[None] / 255)[0]] * 5)
    found = ladder.Ladder()
    found.add([{"mask": mask} for mask in masks], sums, torch.ones(5, 4, 7, 7))
    found.merge(World())
    found.report("scenes", torch.ones(1, 1, 7, 7), 0, tmp_path)
    content = json.loads((tmp_path / "maps-scenes.json").read_text())
    assert content["photos"] == 2
    scores = content["auc"]
    assert scores["mask"] > 0.99 and scores["features"] == scores["training_masks"] == 0.5
    assert scores["captioner"] == pytest.approx(0.5, abs=1e-6)  # right on one, wrong on the other
    assert "on 2 masks of scenes: mask 1.000, centre 0.500" in capsys.readouterr().out
    ladder.Ladder().report("nothing", None, 0, tmp_path)
    assert not (tmp_path / "maps-nothing.json").exists()


def test_the_mean_mask_is_that_of_the_training_set():
    mean = ladder.mean_mask("shapes-test", "data")
    masks = torch.stack([Shapes("test")[i]["mask"] for i in range(len(Shapes("test")))]) / 255
    assert torch.allclose(mean, ladder.mask_map(masks).mean(0, keepdim=True), atol=1e-6)
    assert ladder.mean_mask("nowhere", "data") is None
    many = ladder.spread(range(1250))
    assert len(many) == 500 and [many[0], many[1], many[499]] == [0, 2, 1247]
