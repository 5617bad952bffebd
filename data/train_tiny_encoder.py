"""Train data/tiny_encoder.pt, the small encoder that makes the default runs need no download.

    python -m data.train_tiny_encoder            # about ten minutes on two CPU cores

Like an ImageNet encoder it learns to name the object of a picture that shows one object or none:
crops of built-in scenes, around their objects with a random margin and from between them, sorted
into eight classes and "nothing". The scenes have another seed than those that the methods train and
test on, and no mask is used.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from common import runtime
from common.backbones import TINY_WEIGHTS, backbone
from common.bank import Bank, batches, epoch_order
from data.shapes import CLASSES, Shapes

BATCH, SIDE, RATE = 64, 64, 4e-3


def collect(scenes: Shapes, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Objects and empty places: scene [N], box (left, top, right, bottom) [N, 4], class [N]."""
    found = []
    for i in range(len(scenes)):
        objects = scenes.objects(i)
        found += [(i, one["box"], CLASSES.index(one["class"])) for one in objects]
        x, y = (torch.rand(2, generator=random) * (scenes.size - 40)).int().tolist()
        if not any(
            x < right and left < x + 40 and y < bottom and top < y + 40
            for left, top, right, bottom in (one["box"] for one in objects)
        ):
            found.append((i, (x, y, x + 40, y + 40), len(CLASSES)))
    scene, box, kind = zip(*found)
    return torch.tensor(scene), torch.tensor(box).float(), torch.tensor(kind)


def crop(images: Tensor, boxes: Tensor, random: torch.Generator) -> Tensor:
    """A square around each box, 1.1 to 2.7 times its side, shifted a little. [B, 3, 64, 64]"""
    middle, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, True)
    side = side * (1.1 + 1.6 * torch.rand(side.shape, generator=random))
    middle = middle + side * 0.25 * (torch.rand(middle.shape, generator=random) - 0.5)
    squares = torch.cat([middle - side / 2, middle + side / 2], 1)
    return roi_align(images, list(squares[:, None]), SIDE, sampling_ratio=2, aligned=True)


def main(argv: list[str] | None = None) -> None:
    """Train, report accuracy on unseen scenes, save the encoder in half precision."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=2500)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1, help="of the scenes; the methods use seed 0")
    parser.add_argument("--out", default=TINY_WEIGHTS)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    random = runtime.generator("cpu", args.seed, "crops")
    train = Shapes("train", count=args.scenes, seed=args.seed)
    test = Shapes("test", count=200, seed=args.seed)
    scene, box, kind = collect(train, random)
    test_scene, test_box, test_kind = collect(test, random)
    bank, test_bank = (Bank(scenes, scenes.size, torch.device("cpu")) for scenes in (train, test))
    encoder = backbone("tiny", "none")
    head = nn.Linear(encoder.channels[-1], len(CLASSES) + 1)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, epochs=args.epochs, steps_per_epoch=len(kind) // BATCH, pct_start=0.15
    )
    for epoch in range(1, args.epochs + 1):
        order, batch = epoch_order(len(kind), BATCH, args.seed, epoch)
        encoder.train()
        for index, flip in batches(order, batch, args.seed, epoch):
            crops = crop(bank.images(scene[index]), box[index], random)
            crops = torch.where(flip.view(-1, 1, 1, 1), crops.flip(3), crops)
            logits = head(encoder(crops)[-1].mean((2, 3)))  # [B, 9]
            loss = F.cross_entropy(logits, kind[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        encoder.eval()
        with torch.no_grad():
            crops = crop(test_bank.images(test_scene), test_box, random)
            right = (head(encoder(crops)[-1].mean((2, 3))).argmax(1) == test_kind).float().mean()
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, {right:.1%} of unseen crops right", flush=True
        )
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in encoder.state_dict().items()
    }
    runtime.write_atomic(args.out, lambda part: torch.save(state, part))


if __name__ == "__main__":
    runtime.cli(main)
