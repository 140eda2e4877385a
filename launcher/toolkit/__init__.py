"""What recipes take from: data sets, images, texts, metrics. The core never imports it."""
