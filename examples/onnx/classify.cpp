// Classify one image with a head shipped by featcache ship --to openvino:
// classify model.xml image.ppm
#include <cstdint>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <string>

#include <openvino/openvino.hpp>

int main(int count, char** words) try {
    if (count != 3) {
        std::cerr << "usage: classify model.xml image.ppm\n";
        return 2;
    }
    // Any decoder will do: what counts is upright RGB, uint8 (1, height, width, 3).
    std::ifstream file(words[2], std::ios::binary);
    std::string kind;
    std::size_t width = 0, height = 0, most = 0;
    if (!(file >> kind >> width >> height >> most) || kind != "P6" || most != 255) {
        std::cerr << words[2] << ": expected a PPM image, P6; convert it first\n";
        return 1;
    }
    file.get();
    ov::Tensor image(ov::element::u8, {1, height, width, 3});
    file.read(reinterpret_cast<char*>(image.data<std::uint8_t>()), image.get_byte_size());

    ov::Core core;
    auto model = core.read_model(words[1]);
    // Some processors would compute in bfloat16, whose pixels are not Pillow's.
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();
    request.set_tensor("image", image);
    request.infer();

    auto probabilities = request.get_tensor("probabilities");
    for (std::size_t index = 0; index < probabilities.get_size(); ++index)
        std::cout << model->get_rt_info<std::string>("featcache", "class_" + std::to_string(index))
                  << ' ' << std::fixed << std::setprecision(6)
                  << probabilities.data<float>()[index] << '\n';
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
