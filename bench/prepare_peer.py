"""What a Python user writes to prepare pictures: decode, resize, centre crop, encode, WebDataset in and out; on one core.

    python prepare_peer.py cv2|pil IN.tar OUT.tar SIDE

Prints one JSON object: images, CPU seconds (user and system) of the work without start-up, and of decoding alone.
"""

import io
import json
import sys
import tarfile
import time


def missing(package):
    sys.exit(f"prepare_peer: {package} is missing: python3 -m pip install {package} (in a Python of its own, named by PEERS_PYTHON)")


def cv2_peer(side):
    try:
        import cv2
        import numpy
    except ImportError:
        missing("opencv-python-headless")
    cv2.setNumThreads(1)

    def decode(data):
        return cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_COLOR)

    def make(picture):
        height, width = picture.shape[:2]
        scale = side / min(width, height)
        width, height = round(width * scale), round(height * scale)
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture[top : top + side, left : left + side]
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    return decode, make, cv2.__version__


def pil_peer(side):
    try:
        import PIL
        from PIL import Image
    except ImportError:
        missing("pillow")

    def decode(data):
        return Image.open(io.BytesIO(data)).convert("RGB")

    def make(picture):
        scale = side / min(picture.size)
        width, height = (round(edge * scale) for edge in picture.size)
        picture = picture.resize((width, height), Image.LANCZOS)
        left, top = (width - side) // 2, (height - side) // 2
        out = io.BytesIO()
        picture.crop((left, top, left + side, top + side)).save(out, "JPEG", quality=95)
        return out.getvalue()

    return decode, make, PIL.__version__


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def prepare(source, destination, decode, make):
    images = 0
    with tarfile.open(source, "r|") as read, tarfile.open(destination, "w|") as write:
        for member in read:
            data = read.extractfile(member).read()
            if member.name.endswith(".jpg"):
                data = make(decode(data))
                images += 1
            add(write, member.name, data)
    return images


def main():
    peer, source, destination, side = sys.argv[1:]
    decode, make, version = {"cv2": cv2_peer, "pil": pil_peer}[peer](int(side))
    began = time.process_time()
    images = prepare(source, destination, decode, make)
    seconds = time.process_time() - began
    with tarfile.open(source) as tar:
        pictures = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    began = time.process_time()
    for picture in pictures:
        decode(picture)
    decoding = time.process_time() - began
    print(json.dumps({"version": version, "images": images, "cpu_seconds": seconds, "decode_cpu_seconds": decoding}))


if __name__ == "__main__":
    main()
