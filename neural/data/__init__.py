"""Sets of data by name, and streams of batches that resume exactly."""

from neural.data.augment import AUGMENTATIONS, augment_batch
from neural.data.catalog import DATASETS, Data, load, load_images
from neural.data.folder import FolderBatches, ImageFolder, ImagePack, StreamData
from neural.data.images import ImageBatches, ImageData, Images, evaluation_batches
from neural.data.opinions import Opinions, load_opinions
from neural.data.text import TextBatches, TextData, evaluation_windows

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Data",
    "FolderBatches",
    "ImageBatches",
    "ImageData",
    "ImageFolder",
    "ImagePack",
    "Images",
    "Opinions",
    "StreamData",
    "TextBatches",
    "TextData",
    "augment_batch",
    "evaluation_batches",
    "evaluation_windows",
    "load",
    "load_images",
    "load_opinions",
]
