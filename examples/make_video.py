"""Make a video with a session: open a model, ask, save.

python examples/make_video.py [OUT]
"""

import sys

import mxdit

session = mxdit.Session.open(method="mxfp4")  # the bundled model; Session.open("DIR", device="cuda") for one of yours
result = session.run(session.request(prompt="a red seven moving left on a blue background"))
result.save(sys.argv[1] if len(sys.argv) > 1 else "seven.mp4")
