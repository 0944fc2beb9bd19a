# ruff: noqa: PLR0917 - a kernel is launched with its arguments in order
"""Kernels of group normalisation on channels-last activations: (B, H·W, C) in memory, a pixel's channels side by side.

Statistics are taken per channel over a chunk of pixels, then put together per group, so that a group's width does not
matter and no two programs write to one place: the same numbers in every run. Sums are float32 whatever the
activations' type. Variances come from deviations (Welford within a chunk, Chan over chunks), never from E[x²] − E[x]²,
which loses everything where the mean is large against the spread.
"""

import triton
import triton.language as tl


@triton.jit
def _channels_here(channels, BLOCK_CHANNELS: tl.constexpr):
    """Numbers of this program's channels, and which of them exist."""
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return channel, channel < channels


@triton.jit
def _tile(channels, pixels, first, channel, is_channel, BLOCK_PIXELS: tl.constexpr):
    """Places in an image of a tile that begins at pixel `first`, and which of them exist."""
    pixel = first + tl.arange(0, BLOCK_PIXELS)
    inside = (pixel < pixels)[:, None] & is_channel[None, :]
    # 64 bits: a large picture of many channels has more numbers than 32 bits count.
    return pixel.to(tl.int64)[:, None] * channels + channel[None, :], inside


@triton.jit(do_not_specialize=["pixels", "chunk", "chunks"])
def channel_moments(
    x, means, spreads, channels, pixels, chunk, chunks, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over one chunk of one image's pixels.

    Grid: (chunks, tiles of channels, B). Results: (B, chunks, C).
    """
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * chunk
    x += image * pixels * channels
    channel, is_channel = _channels_here(channels, BLOCK_CHANNELS)
    # Every place of the tile keeps moments of its own; they meet once, behind the loop.
    mean = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    spread = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    seen = tl.zeros([BLOCK_PIXELS], tl.float32)
    for start in range(0, chunk, BLOCK_PIXELS):
        place, inside = _tile(channels, pixels, first + start, channel, is_channel, BLOCK_PIXELS)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        seen += (first + start + tl.arange(0, BLOCK_PIXELS) < pixels).to(tl.float32)
        deviation = tl.where(inside, value - mean, 0.0)
        mean += deviation * (1.0 / tl.maximum(seen, 1.0))[:, None]
        spread += deviation * (value - mean)
    count = tl.sum(seen)
    average = tl.sum(mean * seen[:, None], 0) / count
    apart = mean - average[None, :]
    total = tl.sum(spread + seen[:, None] * apart * apart, 0)
    target = (image * chunks + tl.program_id(0)) * channels + channel
    tl.store(means + target, average, mask=is_channel)
    tl.store(spreads + target, total, mask=is_channel)


@triton.jit(do_not_specialize=["pixels", "chunk", "chunks", "epsilon"])
def group_moments(
    channel_means,
    channel_spreads,
    mean,
    deviation,
    channels,
    pixels,
    chunk,
    chunks,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Mean and 1/√(variance + ε) of each group of WIDTH channels, from its channels' moments over chunks.

    Grid: (groups, B). Results: (B, groups).
    """
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_WIDTH)
    rows = tl.arange(0, BLOCK_CHUNKS)
    begin = image * chunks * channels + group * WIDTH
    size = pixels.to(tl.float32) * WIDTH
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_WIDTH], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        number = start + rows
        inside = (number < chunks)[:, None] & (within < WIDTH)[None, :]
        count = tl.minimum(pixels - number * chunk, chunk).to(tl.float32)
        source = begin + number[:, None] * channels + within[None, :]
        total += count[:, None] * tl.load(channel_means + source, mask=inside, other=0.0)
    average = tl.sum(total) / size
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_WIDTH], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        number = start + rows
        inside = (number < chunks)[:, None] & (within < WIDTH)[None, :]
        count = tl.minimum(pixels - number * chunk, chunk).to(tl.float32)
        source = begin + number[:, None] * channels + within[None, :]
        apart = tl.load(channel_means + source, mask=inside, other=0.0) - average
        spread = tl.load(channel_spreads + source, mask=inside, other=0.0)
        total += tl.where(inside, spread + count[:, None] * apart * apart, 0.0)
    groups = channels // WIDTH
    tl.store(mean + image * groups + group, average)
    tl.store(deviation + image * groups + group, 1.0 / tl.sqrt(tl.sum(total) / size + epsilon))


@triton.jit
def _parameters(mean, deviation, weight, bias, image, channel, is_channel, channels, weight_stride, width):
    """Of a tile's channels: their group's mean and 1/deviation, and their scale and shift, float32."""
    place = image * (channels // width) + channel // width
    average = tl.load(mean + place, mask=is_channel, other=0.0)
    scale = tl.load(deviation + place, mask=is_channel, other=0.0)
    gamma = tl.load(weight + image * weight_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    beta = tl.load(bias + image * weight_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    return average, scale, gamma, beta


@triton.jit(do_not_specialize=["pixels", "chunk", "width"])
def apply_norm(
    x,
    mean,
    deviation,
    weight,
    bias,
    result,
    channels,
    weight_stride,
    pixels,
    chunk,
    width,
    SWISH: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """result = swish((x − mean)·deviation·weight + bias), or without the swish.

    Grid: (chunks, tiles of channels, B). `weight_stride` is C where every image has its own weights, else 0.
    """
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * chunk
    channel, is_channel = _channels_here(channels, BLOCK_CHANNELS)
    average, scale, gamma, beta = _parameters(
        mean, deviation, weight, bias, image, channel, is_channel, channels, weight_stride, width
    )
    begin = image * pixels * channels
    for start in range(0, chunk, BLOCK_PIXELS):
        place, inside = _tile(channels, pixels, first + start, channel, is_channel, BLOCK_PIXELS)
        place += begin
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = (value - average[None, :]) * scale[None, :] * gamma[None, :] + beta[None, :]
        if SWISH:
            value = value * tl.sigmoid(value)
        tl.store(result + place, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _normalised_and_gradient(x, gradient, place, inside, average, scale, gamma, beta, SWISH: tl.constexpr):
    """Normalised activations, and the gradient before the swish, which is computed once more; float32 tiles."""
    normalised = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    normalised = tl.where(inside, (normalised - average[None, :]) * scale[None, :], 0.0)
    slope = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    if SWISH:
        value = normalised * gamma[None, :] + beta[None, :]
        share = tl.sigmoid(value)
        slope = slope * share * (1.0 + value * (1.0 - share))
    return normalised, slope


@triton.jit(do_not_specialize=["pixels", "chunk", "chunks", "width"])
def channel_sums(
    x,
    gradient,
    mean,
    deviation,
    weight,
    bias,
    sums,
    products,
    channels,
    weight_stride,
    pixels,
    chunk,
    chunks,
    width,
    SWISH: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Σ g and Σ g·x̂ of each channel over a chunk, with g the gradient before the swish and x̂ the normalised x.

    Grid: (chunks, tiles of channels, B). Results: (B, chunks, C).
    """
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * chunk
    channel, is_channel = _channels_here(channels, BLOCK_CHANNELS)
    average, scale, gamma, beta = _parameters(
        mean, deviation, weight, bias, image, channel, is_channel, channels, weight_stride, width
    )
    begin = image * pixels * channels
    total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    weighted = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, chunk, BLOCK_PIXELS):
        place, inside = _tile(channels, pixels, first + start, channel, is_channel, BLOCK_PIXELS)
        place += begin
        normalised, slope = _normalised_and_gradient(x, gradient, place, inside, average, scale, gamma, beta, SWISH)
        total += slope
        weighted += slope * normalised
    target = (image * chunks + tl.program_id(0)) * channels + channel
    tl.store(sums + target, tl.sum(total, 0), mask=is_channel)
    tl.store(products + target, tl.sum(weighted, 0), mask=is_channel)


@triton.jit(do_not_specialize=["chunks"])
def group_sums(
    sums,
    products,
    weight,
    image_sums,
    image_products,
    group_sum,
    group_product,
    channels,
    weight_stride,
    chunks,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Both sums over an image's chunks, per channel (B, C), and weighted by the channels' scales per group (B, groups).

    Grid: (groups, B).
    """
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, BLOCK_WIDTH)
    is_channel = within < WIDTH
    begin = image * chunks * channels + group * WIDTH
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_WIDTH], tl.float32)
    weighted = tl.zeros([BLOCK_CHUNKS, BLOCK_WIDTH], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        number = start + tl.arange(0, BLOCK_CHUNKS)
        inside = (number < chunks)[:, None] & is_channel[None, :]
        source = begin + number[:, None] * channels + within[None, :]
        total += tl.load(sums + source, mask=inside, other=0.0)
        weighted += tl.load(products + source, mask=inside, other=0.0)
    channel = group * WIDTH + within
    total_of_channel, product_of_channel = tl.sum(total, 0), tl.sum(weighted, 0)
    tl.store(image_sums + image * channels + channel, total_of_channel, mask=is_channel)
    tl.store(image_products + image * channels + channel, product_of_channel, mask=is_channel)
    gamma = tl.load(weight + image * weight_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
    place = image * (channels // WIDTH) + group
    tl.store(group_sum + place, tl.sum(gamma * total_of_channel))
    tl.store(group_product + place, tl.sum(gamma * product_of_channel))


@triton.jit(do_not_specialize=["pixels", "chunk", "width"])
def input_gradient(
    x,
    gradient,
    skip,
    mean,
    deviation,
    weight,
    bias,
    group_sum,
    group_product,
    result,
    channels,
    weight_stride,
    pixels,
    chunk,
    width,
    SWISH: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """deviation·(w·g − mean(w·g) − x̂·mean(w·g·x̂)), means over the group, plus what comes down the skip connection.

    Grid: (chunks, tiles of channels, B).
    """
    image = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * chunk
    channel, is_channel = _channels_here(channels, BLOCK_CHANNELS)
    average, scale, gamma, beta = _parameters(
        mean, deviation, weight, bias, image, channel, is_channel, channels, weight_stride, width
    )
    size = pixels.to(tl.float32) * width
    group = image * (channels // width) + channel // width
    common = tl.load(group_sum + group, mask=is_channel, other=0.0) / size
    along = tl.load(group_product + group, mask=is_channel, other=0.0) / size
    begin = image * pixels * channels
    for start in range(0, chunk, BLOCK_PIXELS):
        place, inside = _tile(channels, pixels, first + start, channel, is_channel, BLOCK_PIXELS)
        place += begin
        normalised, slope = _normalised_and_gradient(x, gradient, place, inside, average, scale, gamma, beta, SWISH)
        value = scale[None, :] * (gamma[None, :] * slope - common[None, :] - normalised * along[None, :])
        if HAS_SKIP:
            value += tl.load(skip + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + place, value.to(result.dtype.element_ty), mask=inside)
