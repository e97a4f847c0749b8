"""How many images the Oxford-IIIT Pet data set has (Parkhi et al. 2012): 37 breeds, 3,680 trainval, 3,669 test."""

from __future__ import annotations

from collections.abc import Mapping

BREEDS = [
    "Abyssinian",
    "Bengal",
    "Birman",
    "Bombay",
    "British_Shorthair",
    "Egyptian_Mau",
    "Maine_Coon",
    "Persian",
    "Ragdoll",
    "Russian_Blue",
    "Siamese",
    "Sphynx",
    "american_bulldog",
    "american_pit_bull_terrier",
    "basset_hound",
    "beagle",
    "boxer",
    "chihuahua",
    "english_cocker_spaniel",
    "english_setter",
    "german_shorthaired",
    "great_pyrenees",
    "havanese",
    "japanese_chin",
    "keeshond",
    "leonberger",
    "miniature_pinscher",
    "newfoundland",
    "pomeranian",
    "pug",
    "saint_bernard",
    "samoyed",
    "scottish_terrier",
    "shiba_inu",
    "staffordshire_bull_terrier",
    "wheaten_terrier",
    "yorkshire_terrier",
]

_FEWER = {
    "trainval": {
        "Bombay": 96,
        "Egyptian_Mau": 93,
        "Siamese": 99,
        "english_cocker_spaniel": 96,
        "newfoundland": 96,
    },
    "test": {
        "Abyssinian": 98,
        "Bombay": 88,
        "Egyptian_Mau": 97,
        "boxer": 99,
        "keeshond": 99,
        "scottish_terrier": 99,
        "staffordshire_bull_terrier": 89,
    },
}

OFFICIAL: dict[str, dict[str, int]] = {
    split: {breed: fewer.get(breed, 100) for breed in BREEDS} for split, fewer in _FEWER.items()
}
"""Images per split and breed."""


def compare_counts(split: str, found: Mapping[str, int]) -> list[str]:
    """Compare a split with the official one, breed by breed.

    Args:
        split: ``trainval`` or ``test``.
        found: Images per class; breeds that are not official (the sample's) are not looked at.

    Returns:
        A sentence per difference; none where all is as it should be, be it all 37 breeds or some of them.

    Example:
        >>> compare_counts("test", {"boxer": 98, "pug": 100})
        ['test: 98 images of boxer, officially 99']
    """
    official = OFFICIAL[split]
    return [
        f"{split}: {count} images of {breed}, officially {official[breed]}"
        for breed, count in found.items()
        if breed in official and count != official[breed]
    ]
