"""Files of the published sets: names, addresses and checksums."""

from __future__ import annotations

from neural.data.fetch import File

_IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")  # fmt: skip
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"


#: Bytes of a megabyte; limits are rounded up from the published sizes.
_MB = 10**6


def _idx_files(base: str, sums: tuple[str, str, str, str]) -> tuple[File, ...]:
    # The sums are those of the raw idx files: mirrors and Linux distributions compress anew, so
    # that the same images come in .gz files with other sums.
    return tuple(File(n, base + n, md5, True, 40 * _MB) for n, md5 in zip(_IDX, sums, strict=True))


#: name of a set -> its files, with the checksums of their publishers.
FILES: dict[str, tuple[File, ...]] = {
    "fashion_mnist": _idx_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9",
         "8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
    ),
    "mnist": _idx_files(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
         "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    ),
    "cifar10": (File("cifar-10-python.tar.gz", f"{_TORONTO}/cifar-10-python.tar.gz",
                     "c58f30108f718f92721af3b95e74349a", limit=200 * _MB),),
    "cifar100": (File("cifar-100-python.tar.gz", f"{_TORONTO}/cifar-100-python.tar.gz",
                      "eb9058c3a382ffc7106e4002c42a8d85", limit=200 * _MB),),
    "cifar10_q75": (File("cifar10_q75_pack.npz"),),
    "cifar10_lossless_part": (File("cifar10_lossless_part_webp.npz"),),
    "svhn": (File("train_32x32.mat", f"{_SVHN}/train_32x32.mat",
                  "e26dedcc434d2e4c54c9b2d4a06d8373", limit=200 * _MB),
             File("test_32x32.mat", f"{_SVHN}/test_32x32.mat",
                  "eb5a983be6a315427106f1b164d9cef3", limit=100 * _MB)),
    "lsun_resized": (File("LSUN_resize.tar.gz",
                          "https://www.dropbox.com/s/moqh2wh8696c3yl/LSUN_resize.tar.gz?dl=1",
                          "278b7b31c8cb7e804a1465a8ce03a2dc", limit=100 * _MB),),
    "tiny_imagenet_resized": (
        File("Imagenet_resize.tar.gz",
             "https://www.dropbox.com/s/kp3my3412u5k9rl/Imagenet_resize.tar.gz?dl=1",
             "0f9ff11d45babf2eff5fe12281d1ac31", limit=100 * _MB),),
    "emnist_letters": (File("gzip.zip", "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
                            "58c8d27c78d21e728a6bc7b3cc06412e", limit=700 * _MB),
                       File("emnist_letters_test.npz")),
    "imagenet_sample": (File("imagenet_sample_224_q90.npz"),),
    "enwik8": (File("enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip",
                    # of the 10^8 bytes; no sum of the .zip is published
                    "a1fa5ffddb56f4953e226637dabbb36a", True, 50 * _MB),),
    "wikitext2_bytes": (File("wikitext2_valid.txt"), File("wikitext2_test.txt")),
}  # fmt: skip
