"""Building blocks for recipes: data sets, images, texts, metrics. The core never imports them."""
