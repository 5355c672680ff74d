"""Images in prompts, which no teacher is asked about: refused before training where they can be seen."""

from itertools import islice
from typing import Any


IMAGES_REFUSED = (
    "With a teacher only text is supported: the cost of a token is computed from the text alone. Vision-language models "
    "can be student and teacher on text prompts. Remove the images (`dataset.remove_columns`, or the image parts of the "
    "messages), or train without a teacher."
)


def check_no_images(train_dataset: Any, eval_dataset: Any) -> None:
    """
    Refuse datasets with images, by their first rows.

    Args:
        train_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `None`):
            Training data. A stream is opened anew and read by one row.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], `dict` of them or `None`):
            Evaluation data.

    Raises:
        ValueError: If the first row has a column `image` or `images`, or a message with an image.
    """
    evaluation = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for name, dataset in {"training": train_dataset, **evaluation}.items():
        if dataset is None:
            continue
        for row in islice(dataset, 1):
            columns = sorted({"image", "images"} & row.keys())
            if columns:
                raise ValueError(f"The {name} dataset has the column {columns[0]!r}. {IMAGES_REFUSED}")
            messages = row.get("prompt", [])
            contents = [] if isinstance(messages, str) else [message.get("content") for message in messages]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            if any(part["type"] == "image" for part in parts):
                raise ValueError(f"A message of the {name} dataset has an image. {IMAGES_REFUSED}")
