"""Images and annotations on their way to the network.

``coco`` reads COCO JSON, ``images`` decodes pictures, ``transforms`` resizes and augments,
``batches`` puts samples together, ``shapes`` writes a generated data set.
"""
