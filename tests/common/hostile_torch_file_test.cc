// Malicious and malformed .bin files: damaged archives, pickles that want something run,
// tensors that are not what they say.
#include "common/pickle.h"
#include "common/torch_file.h"
#include "tests/common/hostile_files.h"
#include "tests/common/torch_file_builder.h"

namespace routecast {
namespace {

namespace p = pickle;

HostileCase Bytes(const std::string& name, const std::string& bytes,
                  const std::string& phrase) {
  return {name, {{"f.bin", bytes}}, phrase};
}
HostileCase Pickled(const std::string& name, const std::string& data_pkl,
                    const std::string& phrase) {
  return Bytes(name, MakeZip(TorchParts(data_pkl)), phrase);
}
// A dictionary whose tensor "w" is `value`.
HostileCase Value(const std::string& name, const std::string& value,
                  const std::string& phrase) {
  return Pickled(name, p::Dict(p::Text("w") + value), phrase);
}
HostileCase View(const std::string& name, int64_t offset,
                 const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                 const std::string& phrase) {
  return Value(name,
               p::Tensor(p::Storage("FloatStorage", "0", 6), offset, shape, strides),
               phrase);
}
// A good archive, with its first entry changed.
template <typename Change>
HostileCase Part(const std::string& name, Change change, const std::string& phrase) {
  std::vector<ZipPart> parts = TorchParts(p::Dict(OneTensor()));
  change(&parts[0]);
  return Bytes(name, MakeZip(parts), phrase);
}
HostileCase Ends(const std::string& name, const ZipDamage& damage,
                 const std::string& phrase) {
  return Bytes(name, MakeZip(TorchParts(p::Dict(OneTensor())), damage), phrase);
}

std::vector<HostileCase> WrongFiles() {
  const std::string good = GoodTorchFile();
  return {
      Bytes("empty", "", "usable PyTorch file\n  it is empty"),
      Bytes("noise", std::string(100, 'n'), "does not begin like a zip archive"),
      Bytes("before_1_6", "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
            "of the kind before 1.6"),
      Bytes("lfs_pointer", "version https://git-lfs.github.com/spec/v1\n",
            "Git LFS pointer"),
      Bytes("web_page", "<html>Not found</html>", "a web page"),
      Bytes("ten_bytes", good.substr(0, 10), "it has 10 bytes, not even"),
      Bytes("cut", good.substr(0, good.size() - 3), "no end record"),
      Ends("second_disk", {.disk = 1}, "one of several disks"),
      Ends("directory_beyond_the_file", {.directory_offset = 1 << 30},
           "the directory at 1073741824"),
      Ends("more_entries_than_listed", {.count = 9}, "the directory is cut"),
      Ends("fewer_entries_than_listed", {.count = 3}, "bytes after its 3 entries"),
      Ends("no_entry_there", {.directory_offset = 3}, "no directory entry at byte 0"),
      Ends("locator_damaged", {.zip64 = true, .locator_magic = 7}, "no zip64 locator"),
      Ends("end64_elsewhere", {.zip64 = true, .end64_offset = 1 << 30},
           "the zip64 end record lies at 1073741824"),
      Ends("end64_damaged", {.zip64 = true, .end64_magic = 7}, "no zip64 end record"),
      Ends("two_million_entries", {.count = 2'000'000, .zip64 = true},
           "2000000 entries, above the limit"),
      Ends("directory_of_a_terabyte",
           {.directory_bytes = int64_t{1} << 40, .zip64 = true},
           "a directory of 1099511627776 bytes"),
  };
}

std::vector<HostileCase> WrongEntries() {
  std::vector<ZipPart> twice = TorchParts(p::Dict(OneTensor()));
  twice.push_back(twice[2]);
  std::vector<ZipPart> two_pickles = TorchParts(p::Dict(OneTensor()));
  two_pickles.push_back({"other/data.pkl", "."});
  std::vector<ZipPart> big_endian = TorchParts(p::Dict(OneTensor()));
  big_endian[1].data = "big";
  std::vector<ZipPart> no_header = TorchParts(p::Dict(OneTensor()));
  no_header[1].local_magic = 0x04034b51;
  // The first storage goes on over the next entry: bytes that count twice.
  std::vector<ZipPart> bomb = TorchParts(p::Dict(OneTensor()));
  bomb[2].size_bytes = bomb[2].packed_bytes = bomb[2].local_size = 70;
  return {
      Part(
          "deflated", [](ZipPart* z) { z->method = 8; }, "it is compressed (method 8)"),
      Part(
          "encrypted", [](ZipPart* z) { z->flags = 1; }, "it is encrypted"),
      Part(
          "sizes_disagree", [](ZipPart* z) { z->packed_bytes = 5; },
          "stored as 5 bytes, of"),
      Bytes("local_magic", MakeZip(no_header), "no local header"),
      Part(
          "deflated_in_secret", [](ZipPart* z) { z->local_method = 8; },
          "compressed by its local header"),
      Part(
          "another_name", [](ZipPart* z) { z->local_name = "archive/DATA.pkl"; },
          "its local header has another name"),
      Part(
          "another_size", [](ZipPart* z) { z->local_size = 3; },
          "its local header says 3 bytes"),
      Part(
          "header_beyond_the_file", [](ZipPart* z) { z->header_offset = 0x7fffffff; },
          "its header at 2147483647"),
      Part(
          "data_beyond_the_file",
          [](ZipPart* z) { z->size_bytes = z->packed_bytes = 0x70000000; },
          "1879048192 bytes at"),
      Part(
          "no_zip64_field",
          [](ZipPart* z) { z->size_bytes = z->packed_bytes = 0xffffffff; },
          "its zip64 field is missing"),
      Part(
          "cut_zip64_field",
          [](ZipPart* z) {
            z->size_bytes = z->packed_bytes = 0xffffffff;
            z->extra = Raw<uint16_t>(1) + Raw<uint16_t>(8) + Raw<uint64_t>(50);
          },
          "its zip64 field is cut"),
      Bytes("entry_twice", MakeZip(twice), "stands in it twice"),
      Bytes("overlapping_entries", MakeZip(bomb), "overlaps another"),
      Bytes("no_pickle", MakeZip({{"archive/data/0", "x"}}), "0 entries are called"),
      Bytes("two_pickles", MakeZip(two_pickles), "2 entries are called"),
      Bytes("big_endian", MakeZip(big_endian), "byte order \"big\""),
  };
}

// What a pickle may ask Python for; the marker file would show that somebody did it.
std::vector<HostileCase> WantsToRun() {
  const auto call = [](const std::string& module, const std::string& name) {
    return p::Global(module, name) + "(" + p::Text("touch pwned") + "tR";
  };
  return {
      Value("os_system", call("os", "system"), "global \"os system\""),
      Value("posix_system", call("posix", "system"), "global \"posix system\""),
      Value("eval", call("__builtin__", "eval"), "global \"__builtin__ eval\""),
      Value("getattr", call("__builtin__", "getattr"), "global \"__builtin__ getattr\""),
      Value("subprocess", call("subprocess", "Popen"), "global \"subprocess Popen\""),
      Value("torch_load", call("torch", "load"), "global \"torch load\""),
      Value("near_miss", call("torch._utils", "_rebuild_tensor_v2x"),
            "_rebuild_tensor_v2x\" is not"),
      Value("space_for_newline", "ccollections OrderedDict\n\n)R",
            "global \"collections OrderedDict \""),
      Value("endless_global", "cos" + std::string(4000, 's'), "name does not end"),
      Value("inst", "(" + p::Text("id") + "ios\nsystem\n", "opcode INST"),
      Value("obj", "(" + p::Global("collections", "OrderedDict") + "o", "opcode OBJ"),
      Value("newobj", p::Global("collections", "OrderedDict") + ")\x81",
            "opcode NEWOBJ (0x81)"),
      Value("stack_global", p::Text("os") + p::Text("system") + "\x93",
            "opcode STACK_GLOBAL"),
      Value("ext1", "\x82\x01", "opcode EXT1"),
      Value("text_persid", "P0\n", "opcode PERSID"),
      Value("no_opcode", "\xff", "opcode of no name (0xff)"),
      Value("call_of_text", p::Text("f") + ")R", "what is called is no global"),
      Value("arguments_as_list", p::Global("torch", "FloatStorage") + "]R",
            "arguments are no tuple"),
      Value("filled_dictionary", p::Global("collections", "OrderedDict") + "]\x85R",
            "OrderedDict() with arguments"),
      Value("state_of_a_plain_dict", "}}b", "BUILD of something other"),
  };
}

std::vector<HostileCase> WrongPickles() {
  return {
      Pickled("empty_pickle", "", "byte 0: it is empty"),
      Pickled("protocol_4", "\x80\x04}.", "pickle protocol 4"),
      Pickled("no_end", "\x80\x02}(", "ends without the opcode STOP"),
      Pickled("after_its_end", p::Dict(OneTensor()) + "zz", "2 bytes follow its end"),
      Pickled("text_of_4_gib", "\x80\x02X\xff\xff\xff\xff", "4294967295 bytes are"),
      Pickled("long_of_200_bytes", "\x80\x02\x8a\xc8" + std::string(200, '1') + ".",
              "an integer of 200 bytes"),
      Pickled("cut_number", "\x80\x02J\x01", "4 bytes are announced, 1 are left"),
      Pickled("memo_never_set", "\x80\x02h\x05.", "memo 5 was never set"),
      Pickled("memo_of_4_billion", "\x80\x02}r\xff\xff\xff\xff.", "memo 4294967295 is"),
      Pickled("memo_of_nothing", "\x80\x02q" + std::string(1, '\0') + ".",
              "nothing is there to remember"),
      Pickled("empty_stack", "\x80\x02R.", "taken from an empty stack"),
      Pickled("below_a_mark", "\x80\x02}(s.", "taken from below a mark"),
      Pickled("no_mark", "\x80\x02}u.", "there is no mark"),
      Pickled("odd_items", "\x80\x02}(Nu.", "a key has no value"),
      Pickled("key_of_none", "\x80\x02}(NNu.", "a key is neither text"),
      Pickled("items_for_a_list", "\x80\x02](" + p::Text("k") + "Nu.",
              "what is no dictionary"),
      Pickled("append_to_a_dict", "\x80\x02}Na.", "what is no list"),
      Pickled("two_results", "\x80\x02}}.", "2 values are left"),
      Pickled("stack_of_marks", "\x80\x02" + std::string(200'000, '('),
              "marks without end"),
      Pickled("deep_stack", "\x80\x02" + std::string(200'000, 'N'),
              "more than 100000 values on the stack"),
      Pickled(
          "many_values",
          [] {
            std::string text = "\x80\x02]";
            while (text.size() < 2'700'000) text += "(NNNNNNNNe";
            return text;
          }(),
          "more than 2000000 values"),
      Pickled("huge_pickle", "\x80\x02" + std::string(Pickle::kMaxBytes, 'N'),
              "data.pkl has 33554434 bytes"),
  };
}

std::vector<HostileCase> WrongTensors() {
  const std::string floats = p::Storage("FloatStorage", "0", 6);
  const std::string good = p::Tensor(floats, 0, {2, 3}, {3, 1});
  const std::string rebuild = p::Global("torch._utils", "_rebuild_tensor_v2");
  const std::string storage = p::Text("storage"), type = p::Global("torch", "IntStorage");
  const auto with_storage = [&](const std::string& id) {
    return p::Tensor(id + "Q", 0, {1}, {1});
  };
  const std::string w = p::Text("w");
  return {
      Pickled("a_list", p::Whole("]"), "it holds no dictionary"),
      Pickled(
          "many_names_for_one_tensor",
          [&] {
            std::string text = "\x80\x02}q\x01" + w + good + "q\x02s";
            for (int i = 0; i < 200'000; ++i) {
              text += p::Text(std::to_string(i)) + "h\x02s";
            }
            return text + ".";
          }(),
          "200001 tensors, above the limit"),
      Pickled("number_as_name", p::Dict(p::Int(7) + good), "name is no text"),
      Pickled("empty_name", p::Dict(p::Text("") + good), "has an empty name"),
      Pickled("name_twice", p::Dict(w + good + w + good),
              "stands in the dictionary twice"),
      Value("number", p::Int(7), "tensor \"w\": its value is no tensor"),
      Pickled("itself", "\x80\x02}q\x01(" + p::Text("me") + "h\x01u.",
              "tensor \"me\": its value is no tensor"),
      Pickled("parameter_of_a_parameter",
              p::Dict(p::Text("pp") + p::Parameter(p::Parameter(good))),
              "tensor \"pp\": its value is no tensor"),
      Value("five_arguments", rebuild + "(" + floats + "NNNNtR", "with 5 arguments"),
      Value("parameter_of_nothing",
            p::Global("torch._utils", "_rebuild_parameter") + ")R",
            "_rebuild_parameter with 0 arguments"),
      Value("no_storage", p::Tensor("N", 0, {1}, {1}), "it has no storage"),
      Value("id_of_two", with_storage(storage + type + "\x86"), "no tuple of five"),
      Value("id_of_modules", with_storage("(" + p::Text("module") + type + "NNNt"),
            "does not begin with 'storage'"),
      Value("untyped", with_storage("(" + storage + "NNNNt"), "its storage has no type"),
      Value("quantised", p::Tensor(p::Storage("QInt8Storage", "0", 6), 0, {6}, {1}),
            "global \"torch QInt8Storage\""),
      Value("key_of_none", with_storage("(" + storage + type + "NNNt"), "key is no text"),
      Value("length_of_none", with_storage("(" + storage + type + p::Text("0") + "NNt"),
            "length is no count"),
      Value("absent_storage", p::Tensor(p::Storage("IntStorage", "9", 6), 0, {6}, {1}),
            "its storage \"9\" is not in the archive"),
      Value("storage_outside",
            p::Tensor(p::Storage("IntStorage", "../../etc/passwd", 6), 0, {6}, {1}),
            "\"../../etc/passwd\" is not in"),
      Value("storage_too_long",
            p::Tensor(p::Storage("IntStorage", "0", int64_t{1} << 40), 0, {1}, {1}),
            "should hold 1099511627776 of I32"),
      Value("storage_overflows",
            p::Tensor(p::Storage("IntStorage", "0", (int64_t{1} << 62) + 6), 0, {1}, {1}),
            "should hold 4611686018427387910 of I32"),
      Pickled("storage_of_two_types",
              p::Dict(w + good + p::Text("v") +
                      p::Tensor(p::Storage("IntStorage", "0", 6), 0, {6}, {1})),
              "is I32 here and F32 elsewhere"),
      View("negative_offset", -1, {6}, {1}, "its offset is no count"),
      View("negative_size", 0, {-6}, {1}, "its size holds -6"),
      View("negative_stride", 5, {6}, {-1}, "its stride holds -1"),
      View("sizes_and_strides", 0, {2, 3}, {1}, "2 sizes and 1 strides"),
      View("beyond_the_storage", 1, {6}, {1}, "from 1 reaches beyond"),
      View("huge_view", 0, {int64_t{1} << 62, int64_t{1} << 62}, {int64_t{1} << 62, 1},
           "[4611686018427387904, 4611686018427387904] with stride"),
      View("repeated", 0, {1'000'000'000, 6}, {0, 1}, "share their bytes"),
      View("empty_beyond", 99, {0}, {1}, "it begins beyond its storage"),
      View("seventy_dimensions", 0, std::vector<int64_t>(70, 1),
           std::vector<int64_t>(70, 1), "70 dimensions, above 16"),
      Value("sizes_as_text", rebuild + "(" + floats + p::Int(0) + p::Text("6") + "NNNtR",
            "its size is no tuple"),
  };
}

TEST(HostileTorchFile, EachIsRefusedWithItsOwnMessage) {
  std::vector<HostileCase> cases = WrongFiles();
  for (auto more : {WrongEntries(), WantsToRun(), WrongPickles(), WrongTensors()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  EXPECT_GE(cases.size(), 30u);
  ExpectEachRefused(cases, [](const fs::path& folder) {
    ReadTorchFileIndex(ByteFile(folder / "f.bin"));
    ADD_FAILURE() << "read";
  });
  EXPECT_FALSE(fs::exists("pwned"));
}

}  // namespace
}  // namespace routecast
